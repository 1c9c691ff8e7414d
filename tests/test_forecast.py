"""What training is forecast to take, against real steps on the same batches; planned / was of a whole run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import composed
import isthmus
from isthmus import compose, planning, recipes, sites
from isthmus.cli.app import app
from isthmus.comparing.budget import Uncountable, operations
from isthmus.config import Recipe, Stage, read
from isthmus.costs import costs
from isthmus.forecast import Untraceable, _mean, batches, calibrate, forecast, kept, resident, was
from isthmus.forecast.batches import draw
from isthmus.forecast.trace import Ledger, Trace, in_dtype, trace
from isthmus.training import optimizer
from isthmus.training.run import Feed, mix_of, train
from isthmus.training.step import Step

CPU = torch.device("cpu")
LORA = {"connectors.*": 1e-3, "llm.*layers.*": {"mode": {"r": 4}}}
PAIRS = [
    {"id": str(n), "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat?" + " so" * n},
     {"from": "gpt", "value": "a cat" + " and" * (n % 3)}]} for n in range(24)
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("data")
    composed.picture(1).source.save(folder / "a.png")
    (folder / "data.json").write_text(json.dumps(PAIRS))
    return {"name": str(folder / "data.json"), "images": str(folder)}


def staged(
    data: dict[str, Any], train: dict[str, Any], joint: str = "llava", family: str = "llama", **more: Any
) -> Recipe:
    fields = {"name": "align", "data": [data], "train": train, "budget": {"steps": 4}, "batch_size": 4, "lr": 1e-3}
    stage = Stage.model_validate({**fields, "evaluate_every": None, "save_every": None, **more})
    return composed.recipe(family, joint).but(stages=(stage,), dtype="float32")


def real(recipe: Recipe) -> tuple[Step, list[Any]]:
    """The same stage with weights, and its batches with the encoder's features."""
    model, (stage,) = compose(recipe), recipe.stages
    step = Step(model, stage.objectives)
    optimizer.choose(step, stage)
    step.accompany()
    feed = Feed(stage, mix_of(stage, recipe.seed), model.processor.collator(None, stage.template), recipe.seed)
    batches = [feed(number, 0) for number in range(4)]
    for batch in batches:
        media = batch.media["image"]
        with torch.no_grad():
            media.features = model.encode("image", media)
    step.ready()
    return step, batches


@pytest.mark.parametrize(
    ("joint", "train"),
    [
        ("llava", {"connectors.*": 1e-3}),
        ("llava", LORA),
        ("flamingo", {"connectors.*": 1e-3, "llm.*gated*": 1e-3}),
        pytest.param("cogvlm", LORA, marks=pytest.mark.slow),
        pytest.param("ee_mllm", LORA, marks=pytest.mark.slow),
        ("saisa", LORA),
    ],
)
def test_operations_and_tokens_are_those_of_real_steps(data, joint, train):
    recipe = staged(data, train, joint)
    (ahead,) = forecast(recipe, CPU, 0).stages
    step, batches = real(recipe)
    counted = []
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(batch, step.scales([batch]))[0].backward()
        counted.append(counter.get_total_flops())
    assert ahead.flops == pytest.approx(sum(counted) / 4, rel=0.02)
    tokens = sum(int((batch.segment_BT > 0).sum()) for batch in batches)
    assert ahead.sample["tokens"] * 16 == pytest.approx(tokens) and ahead.sample["media"] == 1 and ahead.steps == 4
    assert ahead.trained == sum(p.numel() for p in step.parameters() if p.requires_grad)
    assert ahead.memory["gradients"] == 4 * ahead.trained and ahead.memory["optimizer"] == 8 * ahead.trained
    weights = {id(p): p.nbytes for p in [*step.parameters(), *step.buffers()]}
    assert ahead.memory["weights"] == pytest.approx(sum(weights.values()), rel=0.01)


@pytest.mark.parametrize("joint", ["kosmos2", "qwen_vl"])
def test_joints_with_tables_of_places_are_traced_in_bfloat16_too(data, joint):
    """As autocast computes, a table in float32 does not make its sum with bfloat16 one of float32 for attention."""
    recipe = staged(data, {"connectors.*": 1e-3}, joint)
    (single,) = forecast(recipe, CPU, 0).stages
    (half,) = forecast(recipe.but(dtype="bfloat16"), CPU, 0).stages
    assert half.flops == single.flops and half.memory["activations"] < single.memory["activations"]


def test_bytes_that_live_are_counted_by_hand():
    x = torch.ones(10, 10, device="meta", requires_grad=True)  # 400 bytes
    with Ledger(torch.nn.ParameterList([x])) as ledger:  # type: ignore[arg-type]
        y = x * 2
        z = y.exp()  # kept for its own backward
        assert ledger.alive == 800
        del y
        assert ledger.alive == 400  # a product with a number keeps nothing
        w = z.view(100)
        assert ledger.alive == 400 and ledger.peak == 800  # a view holds nothing of its own
        del z
        assert ledger.alive == 400
        del w
    assert ledger.alive == 0


def test_a_trace_sees_activations_and_peak(data):
    model = planning.outline(recipe := staged(data, {"connectors.*": 1e-3}))
    assert recipe.stages[0].name == "align"

    class Chain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(100, 100, bias=False, device="meta")
            self.layers = torch.nn.ModuleList([self.inner])

        def ready(self):
            pass

        def scales(self, batches):
            return {}

        def forward(self, batch, scales):
            return torch.relu(self.inner(batch)).sum(), {}

    found = trace(Chain(), [torch.ones(50, 100, device="meta")])
    assert isinstance(found, Trace) and found.flops == 2 * 2 * 50 * 100 * 100  # forward, and the weight's gradient
    assert found.kept == 50 * 100 * 4 + 4  # the relu's output and the sum
    assert found.peak >= found.kept + 2 * 50 * 100 * 4  # gradients of the sum's and the relu's input
    with in_dtype(Step(model, recipe.stages[0].objectives), torch.bfloat16):
        assert model.dtype == torch.bfloat16
    assert model.dtype == torch.float32


def test_a_line_through_traced_steps():
    assert _mean([10, 20, 30, 60], {1: 200.0, 3: 600.0}) == pytest.approx(300)  # 10 per position, mean 30
    assert _mean([5, 5], {0: 7.0}) == 7


def test_calls_are_timed_as_often_as_they_are_made():
    x = torch.ones(300, 300)
    with Ledger(torch.nn.Module()) as ledger:
        for _ in range(10):
            x @ x
    (call,) = ledger.calls
    assert ledger.calls[call] == 10
    found = calibrate.speed(ledger.calls, CPU, 0.2)
    alone = calibrate.best(lambda: x @ x, CPU, 5)
    assert found.tried == 1 and 3 * alone < found.operations < 40 * alone
    assert calibrate.optimizer(2 << 20, CPU) > 0 and 0 <= found.host < 0.1
    assert 5e7 < resident() < 1e11


@pytest.mark.parametrize("seconds", [0.01, 0.3])
def test_a_product_too_large_to_try_is_extrapolated_from_smaller_ones(seconds):
    side = 1 << 14
    with Ledger(torch.nn.Module()) as ledger, torch.device("meta"):
        wide, bias = torch.empty(side, side), torch.empty(side)
        for _ in range(50):
            torch.addmm(bias, wide, wide)
            torch.ones(1 << 12, 1 << 14).view(-1).view(1 << 14, -1)  # below LARGEST, and nothing moves
    found = calibrate.speed(ledger.calls, CPU, seconds)
    x = torch.full((768, 768), 0.01)
    smaller = calibrate.best(lambda: torch.addmm(x[0], x, x), CPU, 5)
    assert 1 / 3 < found.operations / (50 * smaller * (side / 768) ** 3) < 3 and found.tried < 0.05


@pytest.mark.parametrize("parts", [("llm",), ("encoder",), ("llm", "encoder")])
def test_packed_parts_compute_what_dense_ones_do_and_take_less_room(data, parts):
    plain = staged(data, LORA).but(engine={"cache": False})  # the encoder runs in every step
    packed = plain.override([f"{part}.bits=8" for part in parts])
    (dense,), (small,) = (forecast(each, CPU, 0).stages for each in (plain, packed))
    assert small.flops == dense.flops and small.trained == dense.trained
    model, saved = planning.outline(plain), 0
    for root in (model.llm if part == "llm" else model.encoders["image"] for part in parts):
        heads = sites.heads(root)
        for host in (each for each in sites.linears(root).values() if each not in heads):
            saved += 3 * host.weight.numel() - 4 * len(host.weight)  # float32 to int8, with a scale per row
    assert dense.memory["weights"] - small.memory["weights"] == saved > 0


def test_a_step_that_cannot_be_traced_is_one_kind_of_error(data, monkeypatch):
    recipe = staged(data, {"connectors.*": 1e-3}).but(name="mine")
    for kernel in ("flex_attention", "flash_attention_2"):
        told = recipe.override([f"llm.attention={kernel}"])
        with pytest.raises(Untraceable, match=f"mine can be traced: {kernel}") as raised:
            forecast(told, CPU, 0)
        assert "llm.attention=isthmus" in raised.value.remedy
        with pytest.raises(Uncountable, match="cannot be counted"):
            operations(told)
        assert costs(told) == costs(recipe) and planning.plan(told) == planning.plan(recipe)

    def fails(*unused: Any) -> None:
        raise KeyError("a number")

    monkeypatch.setattr(batches, "probe", fails)  # of an encoder that needs numbers
    with pytest.raises(Untraceable, match="without numbers: KeyError: 'a number'") as raised:
        forecast(recipe, CPU, 0)
    assert isinstance(raised.value.__cause__, KeyError)


def test_the_largest_of_a_thousand_samples_is_planned_for_however_small_batches_are(data, tmp_path):
    said = [{"from": "human", "value": "<image>\nwhat?" + " so" * 200}, {"from": "gpt", "value": "yes"}]
    long = {"id": "long", "image": "a.png", "conversations": said}
    (tmp_path / "data.json").write_text(json.dumps([*PAIRS * 8, long]))
    recipe = staged(data | {"name": str(tmp_path / "data.json")}, {"connectors.*": 1e-3}, budget={"epochs": 9})
    drawn = draw(recipe, recipe.stages[0], planning.outline(recipe), None)
    assert len(drawn.steps) == 1024 // 4 and max(drawn.volumes) >= 4 * 200
    assert len(draw(recipe, recipe.stages[0], planning.outline(recipe), 5).steps) == 5


def test_what_the_formula_of_recompute_does_to_memory(data):
    plain, again = (forecast(staged(data, LORA, recompute=recompute), CPU, 0).stages[0] for recompute in (False, True))
    assert again.memory["activations"] < plain.memory["activations"] and again.flops > 1.2 * plain.flops


def test_encoding_in_every_step_takes_the_encoder_and_no_room_for_features(data):
    recipe = staged(data, {"connectors.*": 1e-3})
    (stage,), encoder = recipe.stages, 4 * costs(recipe).encoder
    later = stage.but(name="later", train={"encoders.*": {"lr": 1e-4}})
    (once,), (anew,) = (forecast(recipe.but(engine={"cache": choice}), CPU, 0).stages for choice in (None, False))
    assert once.memory["features"] > 0 == anew.memory["features"]
    assert anew.flops - once.flops == pytest.approx(encoder)
    first, second = forecast(recipe.but(stages=(stage, later)), CPU, 0).stages  # one that trains it, and all do
    assert (first.flops, first.memory["features"]) == (anew.flops, 0) and second.flops > anew.flops


@pytest.mark.slow
def test_options_that_a_stage_sets_of_the_joint_count_from_that_stage_on(data):
    recipe = staged(data, {"connectors.*": 1e-3}, "ee_mllm")
    (first,) = recipe.stages
    told = recipe.but(stages=(first, first.but(name="told", joint={"visual": "ffn"}), first.but(name="more")))
    always = recipe.but(aligner=recipe.aligner.but(options={"visual": "ffn"}))
    (plain,), (skips,) = (forecast(each, CPU, 0).stages for each in (recipe, always))
    assert [stage.flops for stage in forecast(told, CPU, 0).stages] == [plain.flops, skips.flops, skips.flops]
    assert skips.flops < plain.flops and operations(told) == [plain.flops, skips.flops, skips.flops]


def test_published_recipes_are_planned_with_assumed_samples():
    (stage,) = forecast(_cut(recipes.named("llava-1.5-7b")), CPU, 0).stages
    assert stage.assumed and stage.sample["tokens"] == 640 and stage.steps is None and stage.seconds is None
    positions, supervised = 256 * 640, 256 * 32
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    # two layers: forward and input gradients of the frozen matrices, attention twice that; the head is frozen too
    llm = 2 * 2 * positions * 2 * layer + 3 * 2 * 4 * 256 * 640**2 * 4096
    joint = 256 * 576 * (4 * 1024 * 4096 + 6 * 4096 * 4096)
    block = 577 * (8 * 1024**2 + 4 * 1024 * 4096) + 4 * 577**2 * 1024
    encoder = 256 * (24 * block + 2 * 576 * 1024 * 3 * 14**2)  # in every step, as the authors do
    assert stage.memory["features"] == 0
    assert stage.flops == pytest.approx(llm + joint + encoder + 4 * supervised * 4096 * 32000, rel=0.01)


def _cut(recipe: Recipe) -> Recipe:
    """The first stage, on two layers."""
    llm = recipe.llm.but(architecture={**recipe.llm.architecture, "num_hidden_layers": 2})
    return recipe.but(llm=llm, stages=recipe.stages[:1], dtype="float32")


PUBLISHED = [name for name, make in recipes.BOOK.items() if make().llm.architecture is not None]


@pytest.mark.parametrize(
    ("name", "media"),
    [
        pytest.param("blip2-opt-2.7b", 1, marks=pytest.mark.slow),
        ("p-former-opt-2.7b", 0),
        pytest.param("instructblip-vicuna-7b", 1, marks=pytest.mark.slow),
    ],
)
def test_what_connectors_read_is_assumed_too(name, media):
    recipe = _cut(recipes.named(name))
    step = Step(model := planning.outline(recipe), recipe.stages[0].objectives)
    ((batch,),) = draw(recipe, recipe.stages[0], model, None).steps
    assert all(term.count(batch) for term in step.terms.values())  # matching counts only texts that differ
    (stage,) = forecast(recipe, CPU, 0).stages
    assert stage.assumed and stage.sample["media"] == media and stage.flops > 1e12


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_stage_of_every_published_recipe_is_planned(name):
    recipe = recipes.named(name)
    stages = forecast(recipe, CPU, 0).stages
    assert [stage.name for stage in stages] == [stage.name for stage in recipe.stages]
    assert all(stage.assumed and stage.flops > 1e13 for stage in stages)


@pytest.mark.parametrize("name", ["{}/absent.parquet", "{}/absent.tar", "{}/absent.csv", "{}/absent", "documents"])
def test_data_that_are_not_here_are_assumed(tmp_path, name):
    name = name.format(tmp_path)
    more = {"options": {"of": [str(tmp_path / "absent.jsonl")]}} if name == "documents" else {}
    recipe = staged({"name": name, **more}, {"connectors.*": 1e-3})
    (stage,) = forecast(recipe, CPU, 0).stages
    assert stage.assumed


def test_planned_and_was(data, tmp_path):
    recipe, quiet = staged(data, {"connectors.*": 1e-3}), Console(quiet=True)
    was.plan(recipe, tmp_path, CPU, quiet)
    train(recipe, tmp_path, CPU, quiet)
    (stage,) = was.compare(tmp_path)
    assert stage.planned["flops"] == pytest.approx(stage.was["flops"], rel=0.25)  # the meter leaves padding out
    assert stage.was["steps_per_second"] > 0 and stage.planned["steps_per_second"] > 0 and stage.was["peak"] > 1e8
    assert json.loads((tmp_path / "planned.json").read_text())[0]["stage"] == "align"
    assert was.table([stage]).row_count == 1
    before = (tmp_path / "plan.json").stat().st_mtime_ns
    was.plan(recipe, tmp_path, CPU, quiet)  # what was planned stays
    assert (tmp_path / "plan.json").stat().st_mtime_ns == before and was.compare(tmp_path / "none") == []


def test_stages_of_few_steps_are_compared_in_all_but_time(tmp_path):
    told = {"step_seconds": 0.5, "flops": 3e9, "peak": 2e9}
    stages = [{"name": name, **told} for name in ("one", "two", "four", "none")]
    (tmp_path / "plan.json").write_text(json.dumps({"stages": stages}))
    for name, steps in (("one", 1), ("two", 2), ("four", 4)):
        (tmp_path / name).mkdir()
        rows = [
            {"step": n, "seconds": 1.0 + n, "operations": 1e9 * (n + 1), "memory_gb": 1 + n / 8} for n in range(steps)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = was.compare(tmp_path)
    assert [stage.was for stage in found] == [
        {"steps_per_second": None, "flops": 1e9, "peak": 1e9},
        {"steps_per_second": None, "flops": 1.5e9, "peak": 1.125e9},
        {"steps_per_second": 1 / 3.5, "flops": 3.5e9, "peak": 1.375e9},  # the first two are not typical
    ]
    assert [stage["stage"] for stage in json.loads((tmp_path / "planned.json").read_text())] == ["one", "two", "four"]
    console = Console(record=True, file=io.StringIO(), width=100)
    console.print(was.table(found))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "two 2 / too few to time 3 / 1.5 2 / 1.12" in lines and "four 2 / 0.286 3 / 3.5 2 / 1.38" in lines


def test_a_forecast_is_made_once_for_all_seeds_and_rates(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    made: list[Recipe] = []
    monkeypatch.setattr(kept, "forecast", lambda recipe, device: made.append(recipe) or forecast(recipe, device, 0))
    recipe = staged(data, {"connectors.*": 1e-3})
    first = kept.planned(recipe, CPU)
    (kept_one,), (alone,) = first["stages"], forecast(recipe, CPU, 0).plain()["stages"]
    assert [kept_one[name] for name in ("flops", "sample", "steps")] == [
        alone[name] for name in ("flops", "sample", "steps")
    ]
    other = staged(data, {"connectors.*": 5e-3}, lr=2e-3).but(seed=3, name="other")
    again = kept.planned(other, CPU)
    assert again["stages"] == first["stages"] and len(made) == 1
    assert (again["recipe"], again["fingerprint"]) == ("other", other.fingerprint())
    for changed in (
        staged(data, LORA),
        staged(data, {"connectors.*": 1e-3}, batch_size=2),
        recipe.but(dtype="bfloat16"),
    ):
        assert kept.key(changed, CPU) != kept.key(recipe, CPU)
    before = kept.key(recipe, CPU)
    Path(data["name"]).write_text(json.dumps(PAIRS[:20]))
    after = kept.key(recipe, CPU)
    Path(data["name"]).write_text(json.dumps(PAIRS))
    assert before != after


def test_a_forecast_is_made_anew_once_the_code_has_changed(data, tmp_path, monkeypatch):
    recipe, before = staged(data, {"connectors.*": 1e-3}), kept.code(Path(isthmus.__file__).parent)
    seen = {kept.key(recipe, CPU)}
    sources = [{"a.py": "x = 1"}, {"a.py": "x = 2"}, {"b.py": "x = 2"}, {"a.py": "", "b.py": ""}]
    for number, written in enumerate(sources):
        folder = tmp_path / str(number)
        (folder / "deep").mkdir(parents=True)
        for name, text in written.items():
            (folder / "deep" / name).write_text(text)
        monkeypatch.setattr(isthmus, "__file__", str(folder / "__init__.py"))
        seen.add(kept.key(recipe, CPU))
    monkeypatch.undo()
    assert len(seen) == 5 and kept.code.__wrapped__(Path(isthmus.__file__).parent) == before


def test_a_run_that_cannot_be_planned_goes_on(data, tmp_path, monkeypatch):
    console = Console(record=True, file=io.StringIO())

    def fails(*unused: Any) -> None:
        raise NotImplementedError("aten::_local_scalar_dense on meta\nmore")

    monkeypatch.setenv("ISTHMUS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kept, "forecast", fails)
    was.plan(staged(data, LORA), tmp_path, CPU, console)
    assert not (tmp_path / "plan.json").exists() and "no forecast of this run" in console.export_text()


def test_the_verb_tells_it(data, tmp_path):
    runner, file = CliRunner(), tmp_path / "recipe.yaml"
    staged(data, LORA).but(name="mine").save(file)
    told = runner.invoke(app, ["plan", str(file), "--seconds", "0.05"]).output
    for words in ("tokens per sample", "FLOP per step", "activations, memory", "peak memory", "time of the stage"):
        assert words in told, told
    both = runner.invoke(app, ["plan", str(file), "--beside", str(file), "--seconds", "0", "--json"])
    first, second = (each["training"]["stages"][0] for each in json.loads(both.output))
    assert first["flops"] == second["flops"] > 0 and first["memory"]["gradients"] == 4 * first["trained"]
    assert "training" not in json.loads(runner.invoke(app, ["plan", str(file), "--no-steps", "--json"]).output)


@pytest.fixture
def files(data, tmp_path) -> list[str]:
    """Two recipes: one trains the connector, the other LoRA too."""
    for name, awake in (("one", {"connectors.*": 1e-3}), ("two", LORA)):
        staged(data, awake).but(name=name).save(tmp_path / f"{name}.yaml")
    return [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]


def test_several_recipes_stand_side_by_side_with_memory_by_kind(files, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    runner, (one, two) = CliRunner(), files
    named = ["plan", one, "stages.align.batch_size=2", two, "--seconds", "0"]
    lines = runner.invoke(app, named).output.splitlines()
    assert max(map(len, lines)) <= 100
    at = next(number for number, line in enumerate(lines) if line.startswith("memory, MiB"))
    kinds = lines[at].replace("memory, MiB", "").split()
    assert kinds[:4] == ["weights", "grads", "optim.", "activ."] and kinds[-1] == "peak"
    assert [line.split()[0] for line in lines[at + 1 : at + 5]] == ["one", "align", "two", "align"]
    both = json.loads(runner.invoke(app, [*named, "--json"]).output)
    assert [each["recipe"] for each in both] == ["one", "two"]
    for line, each in zip(lines[at + 2 : at + 5 : 2], both):
        (stage,) = each["training"]["stages"]
        shown = dict(zip(kinds, [float(cell.replace(",", "")) for cell in line.split()[1:]]))
        for title, kind in zip(kinds, ("weights", "gradients", "optimizer", "activations")):
            assert shown[title] == pytest.approx(stage["memory"][kind] / 2**20, rel=0.01)
        assert sum(shown[kind] for kind in kinds[:-1]) == pytest.approx(shown["peak"], rel=0.01)
        assert each["image"]["total"] > 0 and stage["sample"]["tokens"] > 0
    whole = (forecast(read(Path(file)), CPU, 0).stages[0].flops for file in files)  # overrides are of all recipes
    assert all(each["training"]["stages"][0]["flops"] < 0.6 * flops for each, flops in zip(both, whole))
    wrong = runner.invoke(app, ["plan", one, "stages.align.lr"]).exception
    assert "'stages.align.lr' is no recipe, and no override without '='" in str(wrong)


def test_recipes_side_by_side_are_not_traced_where_steps_are_not_asked_for(files, monkeypatch):
    def fails(*unused: Any) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("isthmus.forecast.forecast", fails)
    told = CliRunner().invoke(app, ["plan", files[0], "--beside", files[1], "--no-steps"])
    assert told.output == CliRunner().invoke(app, ["plan", *files, "--no-steps"]).output
    assert told.exit_code == 0 and "align" in told.output and "memory" not in told.output
    both = json.loads(CliRunner().invoke(app, ["plan", *files, "--no-steps", "--json"]).output)
    assert len(both) == 2 and all(each["image"]["total"] > 0 and "training" not in each for each in both)


def test_a_recipe_that_cannot_be_traced_keeps_its_row_and_the_others_their_tables(files):
    runner, (one, two) = CliRunner(), files
    recipe = read(Path(one)).override(["llm.attention=flash_attention_2", "name=opaque"])
    recipe.save(file := Path(one).with_name("opaque.yaml"))
    alone = runner.invoke(app, ["plan", str(file)])
    assert alone.exit_code == 0 and f"{planning.plan(recipe).total:,}" in alone.output
    assert "no forecast: no step of opaque can be traced: flash_attention_2" in alone.output
    assert "prefill of one picture" in alone.output and "peak memory" not in alone.output
    both = runner.invoke(app, ["plan", str(file), two, "--seconds", "0"])
    assert "no forecast: no step of opaque" in both.output and "memory, MiB" in both.output
    first, second = json.loads(runner.invoke(app, ["plan", str(file), two, "--seconds", "0", "--json"]).output)
    assert first["training"] is None and "flash_attention_2" in first["untraced"] and first["image"]["total"] > 0
    assert second["training"]["stages"][0]["flops"] > 0 and "untraced" not in second
