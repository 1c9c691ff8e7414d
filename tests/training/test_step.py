"""The step: its gradient does not depend on how it is split, nor on whether activations are recomputed."""

from __future__ import annotations

import pytest
import small
import torch

from isthmus.config import ObjectiveConfig, Recipe
from isthmus.training.optimizer import choose
from isthmus.training.step import Step, held_out
from isthmus.types import Batch, ConfigError, DataError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return small.parts(tmp_path_factory.mktemp("parts"))


def make(recipe: Recipe, objectives: tuple[str, ...] = ("lm",), **train: float) -> Step:
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
