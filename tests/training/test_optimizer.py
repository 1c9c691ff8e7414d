"""What trains: globs, last match wins, LoRA, masters, schedules, the table, and gradients that never come."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import transformers
from rich.console import Console

from isthmus.config import Recipe
from isthmus.model import VLM
from isthmus.training.loop import run_stage
from isthmus.training.optimizer import PATIENCE, Trained, Watch, adamw, choose, norms, rate, table
from isthmus.training.step import Step
from isthmus.types import ConfigError, IsthmusError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts"))


def chosen(recipe: Recipe, dtype: torch.dtype = torch.float32, **stage: Any) -> tuple[Step, dict[str, Any]]:
    made = small.stage(**stage)
    step = Step(small.build(recipe, dtype), made.objectives)
    return step, {each.name: each for each in choose(step, made)}


def test_the_last_match_wins_and_no_match_is_frozen(recipe: Recipe) -> None:
    train = {
        "llm.*": {"lr": 1e-4, "weight_decay": 0.1},
        "llm.model.layers.0.*": 5e-4,
        "llm.model.layers.2.*": {"mode": "frozen"},
    }
    step, trained = chosen(recipe, train=train)
    assert trained["vlm.llm.model.layers.0.mlp.up_proj.weight"].lr == 5e-4
    assert trained["vlm.llm.model.layers.0.mlp.up_proj.weight"].weight_decay == 0
    assert trained["vlm.llm.model.layers.1.mlp.up_proj.weight"].lr == 1e-4
    assert trained["vlm.llm.model.layers.1.mlp.up_proj.weight"].weight_decay == 0.1
    assert trained["vlm.llm.model.layers.1.input_layernorm.weight"].weight_decay == 0
    assert not any("layers.2." in name or "connectors" in name for name in trained)
    wakes = {name for name, parameter in step.named_parameters() if parameter.requires_grad}
    assert wakes == set(trained)
    assert step.vlm.config.trained == ["llm.*", "llm.model.layers.0.*"]


def test_lora_trains_exactly_its_own_parameters(recipe: Recipe) -> None:
    train = {"llm.*": {"mode": {"r": 2}, "lr": 3e-4}, "llm.model.layers.1.*": {"mode": "frozen"}, "connectors.*": 1e-3}
    step, trained = chosen(recipe, name="sft", train=train)
    added = {name for name in trained if name.startswith("vlm.llm.")}
    assert added and all(".grafts.sft." in name and trained[name].lr == 3e-4 for name in added)
    assert not any("layers.1." in name for name in added)
    assert {name for name in trained if name.startswith("vlm.connectors.")} == {
        f"vlm.{name}" for name, _ in step.vlm.named_parameters() if name.startswith("connectors.")
    }
    assert [adapter["name"] for adapter in step.vlm.config.lora] == ["sft"]
    assert "llm.*" not in step.vlm.config.trained


def test_lora_lies_only_where_some_of_it_trains(recipe: Recipe, tmp_path: Path) -> None:
    train = {"llm.*layers.*": {"mode": {"r": 2}}, "llm.*layers.0.*": {"mode": "frozen"}, "llm.*layers.1.mlp.*": 1e-4}
    step, trained = chosen(recipe, name="sft", train=train)
    added = {f"vlm.{name}" for name, _ in step.vlm.named_parameters() if ".grafts." in name}
    assert added and added <= set(trained) and not any(".layers.0." in name for name in added)
    assert any(".layers.1.mlp." in name for name in added), "it trains at the rate of the glob that decides"
    step.vlm.save_pretrained(tmp_path)
    again = VLM.from_pretrained(tmp_path)
    assert {f"vlm.{name}" for name, _ in again.named_parameters() if ".grafts." in name} == added
    more = small.stage(name="more", train={"llm.*layers.0.*": {"mode": {"r": 2}}})
    found = {each.name for each in choose(Step(again, more.objectives), more)}
    assert found and all(".layers.0." in name and ".grafts.more." in name for name in found)
    assert {adapter["name"] for adapter in again.config.lora} == {"sft", "more"}


def test_lora_that_an_earlier_stage_trained_stays_where_a_later_one_freezes_it(recipe: Recipe) -> None:
    step, first = chosen(recipe, name="sft", train={"llm.*q_proj": {"mode": {"r": 2}}})
    train = {"llm.*v_proj": {"mode": {"r": 2}}, "llm.*layers.0.*": {"mode": "frozen"}}
    later = choose(step, small.stage(name="more", train=train))
    names = {name for name, _ in step.named_parameters()}
    assert set(first) <= names and not {each.name for each in later} & set(first)
    assert not any(".layers.0." in name and ".grafts.more." in name for name in names)


def test_a_stage_without_dead_lora_keeps_its_globs(recipe: Recipe) -> None:
    step, _ = chosen(recipe, name="sft", train={"llm.*layers.*": {"mode": {"r": 2}}, "connectors.*": 1e-3})
    assert [adapter["globs"] for adapter in step.vlm.config.lora] == [["llm.*layers.*"]]


@pytest.mark.parametrize("learned", [True, False])
def test_what_an_objective_holds_still_stays_bit_equal(recipe: Recipe, tmp_path: Path, learned: bool) -> None:
    options = {"match": "late", "learned": learned, "temperature": 0.15}
    made, vlm = small.stage(objectives=[{"name": "contrastive", "options": options}]), small.build(recipe)
    sharpness = lambda step: step.objectives["contrastive"].sharpness.item()  # noqa: E731
    feed, quiet = small.Colours(vlm), small.quiet()
    result = run_stage(vlm, made, feed, tmp_path, steps=3, validate=sharpness, console=quiet)
    assert (result.at.best_loss == float(torch.tensor(math.log(1 / 0.15)))) != learned


def test_a_second_lora_gets_a_name_of_its_own(recipe: Recipe) -> None:
    train = {"llm.*q_proj": {"mode": {"r": 2}}, "llm.*v_proj": {"mode": {"r": 4}}}
    step, trained = chosen(recipe, name="sft-1", train=train)
    assert [adapter["name"] for adapter in step.vlm.config.lora] == ["sft_1", "sft_1_2"]
    assert {name.split(".grafts.")[1].split(".")[0] for name in trained} == {"sft_1", "sft_1_2"}


def test_what_trains_has_float32_masters_and_what_is_frozen_keeps_its_dtype(recipe: Recipe) -> None:
    step, trained = chosen(recipe, dtype=torch.bfloat16, train={"llm.model.layers.0.*": 1e-3})
    for name, parameter in step.named_parameters():
        if name in trained:
            assert parameter.dtype == torch.float32
        elif name.startswith("vlm.llm."):
            assert parameter.dtype == torch.bfloat16


def test_modes(recipe: Recipe) -> None:
    step, _ = chosen(recipe, train={"connectors.*": 1e-3})
    step.train()
    step.ready()
    assert not any(module.training for module in step.vlm.llm.modules())
    assert not any(module.training for module in step.vlm.encoders.modules())
    assert all(module.training for module in step.vlm.connectors.modules())
    step.recompute()
    step.ready()
    layer = step.vlm.llm.model.layers[0]
    assert layer.training and not any(module.training for module in layer.children())


@pytest.mark.parametrize(
    "train, message",
    [
        ({"connector.*": 1e-3}, "'connector.*' matches no parameter; did you mean 'connectors.*'"),
        ({"vision_tower.*": 1e-5}, "matches no parameter; did you mean 'encoders.image.*'"),
        ({"model.mm_projector.*": 1e-3}, "did you mean 'connectors.*'"),
        ({"*visual.merger*": 1e-3}, "did you mean 'connectors.*'"),
        ({"all-linear": {"mode": {"r": 2}}}, "did you mean 'llm.*layers.*'"),
        ({"llm.*norms": {"mode": {"r": 2}}}, "matches no Linear"),
        ({"llm.*": {"mode": "frozen"}}, "trains nothing"),
        (
            {"connectors.*": 1e-3, "llm.*q_proj": {"mode": {"r": 2}}, "llm.*": {"mode": "frozen"}},
            "'llm.*q_proj' trains nothing: globs behind it decide on all that it matches",
        ),
        (
            {"llm.*q_proj": {"mode": {"r": 2}}, "llm.*self_attn*": {"mode": {"r": 4}}},
            "'llm.*q_proj' trains nothing: globs behind it",
        ),
        ({"llm.*q_proj": {"mode": {"r": 2}}, "*": 1e-4}, "'llm.*q_proj' trains nothing: globs behind it"),
        ({"connectors.*": 1e-3, "*": 1e-4}, "'connectors.*' trains nothing: globs behind it"),
        ({"encoders.*post_layernorm*": 1e-3}, "'encoders.*post_layernorm*' trains nothing: what the encoder returns"),
        ({"encoders.*layers.2.*": {"mode": {"r": 2}}}, "'encoders.*layers.2.*' trains nothing: what the encoder"),
    ],
)
def test_globs_that_do_nothing_are_refused(recipe: Recipe, train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(recipe, train=train)
    assert message in str(error.value)


def test_what_no_state_of_an_encoder_depends_on_is_frozen_and_not_counted(recipe: Recipe) -> None:
    """CLIP's penultimate state leaves out the last of three blocks and the norm behind it."""
    train = {
        "encoders.*": 1e-3,
        "encoders.*layers.[12].*": {"mode": {"r": 2}},
        "encoders.*post_layernorm*": {"mode": "frozen"},
    }
    step, trained = chosen(recipe, name="see", train=train)
    added = {name for name in trained if ".grafts." in name}
    assert added and all(".layers.1." in name for name in added)
    assert added == {name for name, _ in step.named_parameters() if ".grafts." in name}
    assert not any(part in name for name in trained for part in (".layers.2.", "post_layernorm"))
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table(step, list(trained.values())))
    row = next(line for line in console.export_text().splitlines() if "encoders.image " in line and "+" not in line)
    moving = sum(each.parameter.numel() for name, each in trained.items() if name not in added)
    assert row.split("│")[3].strip() == f"{moving:,}" and "100.00%" not in row


def test_what_is_refused_for_its_place_trains_behind_the_others(recipe: Recipe) -> None:
    wide, narrow = {"llm.*self_attn*": {"mode": {"r": 4}}}, {"llm.*q_proj": {"mode": {"r": 2}}}
    _, trained = chosen(recipe, train={**wide, **narrow})
    ranks = {each.parameter.shape[0] for name, each in trained.items() if name.endswith("q_proj.grafts.align_2.A")}
    assert ranks == {2} and any(".k_proj.grafts.align.A" in name for name in trained)
    _, trained = chosen(recipe, train={"llm.*": {"mode": "frozen"}, **narrow})
    assert trained and all(".q_proj.grafts.align." in name for name in trained)


def test_groups_by_rate_and_decay(recipe: Recipe) -> None:
    _, trained = chosen(recipe, train={"llm.*": {"lr": 1e-4, "weight_decay": 0.1}, "connectors.*": 1e-3})
    groups = adamw(list(trained.values()), (0.8, 0.9)).param_groups
    found = {(group["base_lr"], group["weight_decay"]) for group in groups}
    assert found == {(1e-4, 0.1), (1e-4, 0.0), (1e-3, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert all(group["betas"] == (0.8, 0.9) for group in groups)


def test_biases_and_norms_decay_where_they_are_told_to(recipe: Recipe) -> None:
    train = {"llm.*": {"weight_decay": 0.1}, "connectors.*": {"weight_decay": 0.1, "decay_all": True}}
    step, trained = chosen(recipe, train=train)
    vectors = {name for name, parameter in step.named_parameters() if parameter.ndim == 1 and name in trained}
    decays = {name for name in vectors if trained[name].weight_decay}
    assert decays == {name for name in vectors if "connectors" in name} != set()


def test_moments_exist_for_what_trains_and_for_nothing_else(recipe: Recipe) -> None:
    step, trained = chosen(recipe, train={"connectors.*": 1e-3, "llm.*v_proj": {"mode": {"r": 2}}})
    optimizer = adamw(list(trained.values()), (0.9, 0.999))
    batch = small.Colours(step.vlm)(0, 0)
    step.ready()
    step(batch, step.scales([batch]))[0].backward()
    frozen = [name for name, parameter in step.named_parameters() if name not in trained]
    assert frozen and all(step.get_parameter(name).grad is None for name in frozen)
    optimizer.step()
    assert set(optimizer.state) == {each.parameter for each in trained.values()}
    numbers = sum(each.parameter.numel() for each in trained.values())
    held = sum(tensor.numel() for state in optimizer.state.values() for tensor in state.values())
    assert held == 2 * numbers + len(trained)  # two moments, and a step count per tensor


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_schedules_are_those_of_transformers(warmup: float) -> None:
    steps = 37
    makers = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
        "constant": lambda optimizer, warm, _: transformers.get_constant_schedule_with_warmup(optimizer, warm),
    }
    for name, make in makers.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = make(optimizer, 4 if warmup else 0, steps)
        for number in range(steps):
            assert rate(number, steps, warmup, name) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()


def test_a_schedule_ends_at_its_floor_as_in_transformers() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 4, 37, min_lr_rate=0.3)
    for number in range(37):
        assert rate(number, 37, 0.1, "cosine", 0.3) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rate(10**6, 10**6, 0.0, "linear", 0.3) == pytest.approx(0.3)
    assert rate(50, 100, 0.0, "linear", 0.3) == pytest.approx(0.65)  # half way from 1 to .3


def test_the_last_step_of_a_stage_is_not_one_of_its_warm_up() -> None:
    """In transformers' schedule a stage of one step has no rate at all, for its only step is the warm-up's first."""
    for name in ("cosine", "linear", "constant"):
        assert [rate(0, 1, 0.03, name), rate(0, 2, 0.03, name), rate(1, 2, 0.9, name)] == [1.0, 0.0, 1.0]


def test_the_table_counts_what_trains(recipe: Recipe) -> None:
    step, trained = chosen(
        recipe, name="sft", train={"connectors.*": 2e-3, "llm.*q_proj": {"mode": {"r": 2}, "lr": 1e-4}}
    )
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table(step, list(trained.values())))
    rows = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.count("│") > 3}
    connector = sum(p.numel() for p in step.vlm.connectors.parameters())
    assert f"{connector:,}" in rows["connectors.image"] and "100.00%" in rows["connectors.image"]
    assert "0.002" in rows["connectors.image"] and "frozen" in rows["llm"] and "0.0001" in rows["llm + sft"]
    total, moving = sum(p.numel() for p in step.parameters()), sum(each.parameter.numel() for each in trained.values())
    assert f"{total:,}" in rows["all"] and f"{moving:,}" in rows["all"]


def test_a_tensor_outside_of_the_graph_is_named_once_all_media_were_seen(recipe: Recipe) -> None:
    step, trained = chosen(recipe, train={"connectors.*": 1e-3, "llm.model.layers.0.*": 1e-3})
    feed = small.Colours(step.vlm)
    batch = feed(0, 0)
    watch = Watch(step, list(trained.values()))
    batch_of_text = small.text_batch(step.vlm)
    step(batch_of_text, step.scales([batch_of_text]))[0].backward()
    assert watch.look([batch_of_text]) is None  # no picture yet: the connector may be silent
    for name, each in trained.items():
        if name.startswith("vlm.llm."):
            each.parameter.grad = None
    watch = Watch(step, list(trained.values()))
    with pytest.raises(IsthmusError, match=r"got no gradient: vlm\.(llm|connectors)"):
        watch.look([batch])


def test_norms_of_parts_without_a_gradient_are_zero_where_the_parameters_are() -> None:
    """On a GPU, torch's default device is another than that of the parameters; here it is the one that is no CPU."""
    names = ("vlm.connectors.image.weight", "vlm.llm.a", "vlm.llm.b")
    trained = [Trained(name, torch.nn.Parameter(torch.ones(2)), 1e-3, 0.0) for name in names]
    none = {"grad_norm": 0.0, "grad_norm_connectors": 0.0, "grad_norm_llm": 0.0}
    with torch.device("meta"):
        found = norms(trained)
    assert {name: float(norm) for name, norm in found.items()} == none
    trained[1].parameter.grad, trained[2].parameter.grad = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 2.0])
    with torch.device("meta"):
        found = norms(trained)
    assert {name: float(norm) for name, norm in found.items()} == {**none, "grad_norm": 3.0, "grad_norm_llm": 3.0}


def test_a_gradient_that_stays_zero_is_worth_a_warning(recipe: Recipe) -> None:
    step, trained = chosen(recipe, train={"connectors.*": 1e-3})
    for each in trained.values():
        each.parameter.grad = torch.ones_like(each.parameter)
    dead = next(iter(trained.values()))
    dead.parameter.grad.zero_()
    watch = Watch(step, list(trained.values()))
    said = [watch.look([]) for _ in range(PATIENCE + 1)]
    assert [number for number, text in enumerate(said) if text] == [PATIENCE - 1]
    assert dead.name in said[PATIENCE - 1] and len(trained) > 1
    assert sum(name in said[PATIENCE - 1] for name in trained) == 1
