"""The step: its gradient does not depend on how it is split, nor on whether activations are recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from isthmus.config import ObjectiveConfig, Recipe
from isthmus.training.optimizer import choose
from isthmus.training.step import Step, held_out
from isthmus.types import Batch, ConfigError, DataError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts"))


def make(recipe: Recipe, objectives: tuple[str, ...] = ("lm",), **train: Any) -> Step:
    stage = small.stage(train=train or {"connectors.*": 1e-3, "llm.*": 1e-3}, objectives=list(objectives))
    step = Step(small.build(recipe), stage.objectives)
    choose(step, stage)
    step.ready()
    return step


def gradients(step: Step, batches: list[Batch]) -> dict[str, torch.Tensor]:
    scales = step.scales(batches)
    for batch in batches:
        step(batch, scales)[0].backward()
    found = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    return found


def test_the_gradient_does_not_depend_on_the_split(recipe: Recipe) -> None:
    step = make(recipe)
    collate = step.vlm.processor.collator()
    samples = [small.sample(number) for number in range(16)]
    splits = [[collate(samples[at : at + 16 // n]) for at in range(0, 16, 16 // n)] for n in (1, 2, 16)]
    whole, *others = [gradients(step, split) for split in splits]
    assert any(name.startswith("vlm.connectors") for name in whole) and any("llm" in name for name in whole)
    for other in others:
        assert other.keys() == whole.keys()
        for name in whole:
            torch.testing.assert_close(other[name], whole[name], rtol=1e-5, atol=1e-6)


def test_recomputed_gradients_are_the_same_even_through_a_frozen_llm(recipe: Recipe) -> None:
    plain = make(recipe, **{"connectors.*": 1e-3})
    batches = [small.Colours(plain.vlm)(0, 0)]
    expected = gradients(plain, batches)
    again = make(recipe, **{"connectors.*": 1e-3})
    again.recompute()
    again.ready()
    calls: list[int] = []
    again.vlm.llm.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(again, batches)
    assert len(calls) == 2  # forward, and once more in backward
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


BOTH = {"connectors.*": 1e-3, "encoders.*layers.[01].*": 1e-3, "llm.*v_proj": {"mode": {"r": 2, "dropout": 0.3}}}


def dropping(recipe: Recipe) -> Step:
    """Encoder, joint and LLM train, with dropout in the additions and in the encoder, always from the same weights."""
    torch.manual_seed(0)
    step = make(recipe, **BOTH)
    for layer in step.vlm.encoders["image"].tower.encoder.layers:
        layer.self_attn.dropout = 0.2
    torch.manual_seed(1)
    for name, parameter in step.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter)
    return step


def kept_bytes(step: Step, batches: list[Batch]) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that the graph holds on to between forward and backward, parameters aside, and the gradients."""
    own = {parameter.untyped_storage().data_ptr() for parameter in step.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(7)
    scales = step.scales(batches)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = step(batches[0], scales)[0]
    size = sum(held.values())
    total.backward()
    return size, {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


def test_recompute_of_encoder_and_llm_is_bit_equal_under_dropout_and_holds_less(recipe: Recipe) -> None:
    plain, again = dropping(recipe), dropping(recipe)
    batches = [small.Colours(plain.vlm, size=8)(0, 0)]
    again.recompute()
    again.ready()
    calls = {"encoder": 0, "llm": 0}
    parts = {"encoder": again.vlm.encoders["image"].tower.encoder, "llm": again.vlm.llm.model}

    def counting(part: str) -> Any:
        def count(*_: Any) -> None:
            calls[part] += 1

        return count

    for part, module in parts.items():
        module.layers[1].mlp.register_forward_pre_hook(counting(part))
    size, expected = kept_bytes(plain, batches)
    less, found = kept_bytes(again, batches)
    assert calls == {"encoder": 2, "llm": 2}
    assert less < 0.5 * size, (less, size)
    assert expected.keys() == found.keys() and any("encoders" in name for name in found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    plain.zero_grad()
    torch.manual_seed(8)  # other dropout, other gradients: it was on
    plain(batches[0], plain.scales(batches))[0].backward()
    assert any(not torch.equal(p.grad, expected[n]) for n, p in plain.named_parameters() if p.grad is not None)


def test_a_frozen_layer_is_recomputed_in_eval_mode_though_its_flag_is_up(tmp_path: Path) -> None:
    """OPT's layer reads its own flag for dropout."""
    recipe = small.parts(tmp_path, "opt")
    plain, again = make(recipe, **{"connectors.*": 1e-3}), make(recipe, **{"connectors.*": 1e-3})
    for step in (plain, again):
        for layer in step.vlm.llm.model.decoder.layers:
            layer.dropout = 0.5
    again.recompute()
    again.ready()
    batches = [small.Colours(plain.vlm)(0, 0)]
    expected, found = gradients(plain, batches), gradients(again, batches)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_give_the_same_gradients_under_the_same_names(
    recipe: Recipe, backend: str, recompute: bool
) -> None:
    train: Any = {"connectors.*": 1e-3, "llm.*v_proj": {"mode": {"r": 2}}}
    torch.manual_seed(0)
    plain = make(recipe, **train)
    torch.manual_seed(0)
    compiled = make(recipe, **train)
    names, feed = list(compiled.state_dict()), small.Colours(plain.vlm)
    if recompute:
        compiled.recompute()
        compiled.ready()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled.compile(counter)
    for number in (0, 1):  # other lengths, the same code
        expected, found = gradients(plain, [feed(number, 0)]), gradients(compiled, [feed(number, 0)])
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert 1 <= counter.frame_count <= 3, "the three layers share what is compiled"
    assert list(compiled.state_dict()) == names


def test_the_llm_rests_when_no_objective_needs_it(recipe: Recipe) -> None:
    step = make(recipe, ("contrastive",), **{"connectors.*": 1e-3})
    step.vlm.llm.model.layers[0].register_forward_hook(lambda *_: pytest.fail("the LLM ran"))
    found = gradients(step, [small.Colours(step.vlm)(0, 0)])
    assert found["objectives.contrastive.sharpness"] != 0
    assert all(found[name].any() for name in found)


def test_terms_are_weighted_means_that_add_up(recipe: Recipe) -> None:
    stage = small.stage(objectives=[{"name": "lm", "weight": 2.0}, {"name": "contrastive", "weight": 0.5}])
    step = Step(small.build(recipe), stage.objectives)
    batch = small.Colours(step.vlm)(0, 0)
    output = step.vlm.run(batch)
    labels = batch.labels_BT[:, 1:]
    lm = torch.nn.functional.cross_entropy(output.head(output.hidden_BTD)[:, :-1].flatten(0, 1), labels.flatten())
    total, shares = step(batch, step.scales([batch]))
    assert shares["lm"].item() == pytest.approx(2 * lm.item(), rel=1e-5)
    alone = step.terms["contrastive"].loss(step, output, batch).item() / 4
    assert shares["contrastive"].item() == pytest.approx(0.5 * alone, rel=1e-5)
    assert total.item() == pytest.approx(sum(share.item() for share in shares.values()), rel=1e-6)


def test_held_out_loss_is_per_token_over_all_batches(recipe: Recipe) -> None:
    step = make(recipe)
    feed = small.Colours(step.vlm)
    batches = [feed(0, 0), feed(1, 0)]
    validate = held_out(batches)
    sums = [step.terms["lm"].loss(step, step.vlm.run(batch), batch).item() for batch in batches]
    assert validate(step) == pytest.approx(
        sum(sums) / sum(step.terms["lm"].count(batch) for batch in batches), rel=1e-5
    )
    assert not any(parameter.grad is not None for parameter in step.parameters())


def test_refusals(recipe: Recipe) -> None:
    step = make(recipe)
    batch = small.Colours(step.vlm)(0, 0)
    batch.labels_BT[:] = -100
    with pytest.raises(DataError, match="nothing to learn from in samples"):
        step.scales([batch])
    with pytest.raises(ConfigError, match="once"):
        Step(step.vlm, [ObjectiveConfig(name="lm"), ObjectiveConfig(name="lm")])
