"""ViCToR: matching equals the best of all matchings, replaced vectors are the pool's, and the term fills them in."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import composed
import isthmus
from composed import picture, sample
from isthmus.config import Budget, ObjectiveConfig, Stage
from isthmus.connectors.mlp import MLP
from isthmus.connectors.token_pool import TokenPool, match
from isthmus.model import VLM
from isthmus.recipes.victor import victor
from isthmus.training.optimizer import choose
from isthmus.training.run import train
from isthmus.training.step import Step
from isthmus.types import Batch, ConfigError, Context, Features, Output

OPTIONS = {"size": 24}
SAMPLES = (sample(picture(1), "what?"), sample("see", picture(2), picture(3), answer="two dogs"), sample("hello"))
ALL = {"connectors.*": 1e-3, "llm.*": 1e-3, "heads.*": 1e-3}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 3), (4, 6), (5, 5), (2, 7)])
def test_the_matching_is_the_best_of_all(rows: int, columns: int) -> None:
    random = np.random.default_rng(rows * columns)
    for _ in range(25):
        cost = random.normal(size=(rows, columns)).round(1)  # with ties
        found = match(cost)
        assert len(set(found.tolist())) == rows
        best = min(cost[range(rows), list(one)].sum() for one in itertools.permutations(range(columns), rows))
        assert cost[range(rows), found].sum() == pytest.approx(best)


def test_costs_that_are_no_numbers_are_matched_all_the_same() -> None:
    """The loop then says that the loss is not finite."""
    assert match(np.full((2, 3), np.nan)).tolist() == [0, 1]
    assert match(np.array([[0.0, np.inf, 1.0]])).tolist() == [0]


def connector(share: float = 0.75) -> TokenPool:
    torch.manual_seed(0)
    return TokenPool(MLP(6, 8, 2), 8, 20, share, 16)


def test_a_share_of_each_picture_is_the_pools_own_and_the_rest_has_length_one() -> None:
    joint = connector().train()
    features = Features(torch.randn(3, 16, 6), lengths_N=torch.tensor([16, 8, 4]))
    whole = joint.whole(features, Context())
    assert torch.allclose(whole.norm(dim=-1), torch.ones(3, 16))
    y = joint(features, Context())
    for number, length in enumerate((16, 8, 4)):
        same = (y[number] == whole[number]).all(-1)
        from_pool = (y[number][:, None] == joint.pool).all(-1)
        assert int((~same).sum()) == int(0.75 * length)
        assert same[length:].all() and from_pool.any(-1).eq(~same).all()
        assert from_pool.sum(0).max() <= 1  # one to one
    again = joint(features, Context())
    assert not torch.equal(again == whole, y == whole)  # drawn anew


def test_nothing_is_replaced_where_the_pool_or_the_connector_does_not_train() -> None:
    features = Features(torch.randn(2, 16, 6))
    joint = connector().eval()
    assert torch.equal(joint(features, Context()), joint.whole(features, Context()))
    joint.train().pool.requires_grad_(False)
    assert torch.equal(joint(features, Context()), joint.whole(features, Context()))
    with pytest.raises(ConfigError, match="12 vectors of a picture want one each of 11"):
        TokenPool(MLP(6, 8, 2), 8, 11, 0.75, 16)


def step_of(train: dict[str, Any], joint: str = "victor", **options: Any) -> Step:
    leg = Stage.model_validate(
        {
            "name": "comprehend",
            "data": ("none",),
            "train": train,
            "budget": Budget(steps=1),
            "objectives": (ObjectiveConfig(name="lm"), ObjectiveConfig(name="victor", weight=10)),
        }
    )
    vlm: VLM = composed.model("llama", joint, options)
    step = Step(vlm, leg.objectives)
    choose(step, leg)
    step.accompany()
    step.ready()
    return step


def test_the_term_is_the_mean_distance_of_what_the_head_tells() -> None:
    step = step_of(ALL, **OPTIONS)
    batch = step.vlm.processor.collator()(SAMPLES)
    torch.manual_seed(5)
    scales = step.scales([batch])
    _, shares = step(batch, scales)
    torch.manual_seed(5)
    output = step.vlm.run(batch)
    at = batch.input_ids_BT == step.vlm.placeholder("image")
    features = step.vlm.encode("image", batch.media["image"])
    target = F.normalize(step.vlm.connectors["image"].inner(features, Context()), dim=-1).flatten(0, 1)
    gap = (step.vlm.heads["tell"](output.hidden_BTD[at]) - target).abs()
    expected = torch.where(gap < 0.01, gap**2 / 0.02, gap - 0.005).mean()
    assert shares["victor"].item() == pytest.approx(10 * expected.item(), rel=1e-5)


def test_pool_head_and_the_vectors_that_stay_learn() -> None:
    step = step_of(ALL, **OPTIONS)
    batch = step.vlm.processor.collator()(SAMPLES)
    torch.manual_seed(5)
    step(batch, step.scales([batch]))[0].backward()
    found = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
    used = found["vlm.connectors.image.pool"].any(-1).sum()
    assert 0 < used <= 24 and found["vlm.heads.tell.weight"].any()
    assert all(grad.any() for name, grad in found.items() if "connectors.image.inner" in name)
    step.zero_grad()
    scales = {"lm": 0.0, "victor": 1.0}
    torch.manual_seed(5)
    with torch.no_grad():
        output = step.vlm.run(batch)
    output.hidden_BTD = output.hidden_BTD.detach()
    term = step.terms["victor"].loss(step, output, batch) * scales["victor"]
    term.backward()
    assert step.vlm.connectors["image"].inner.layers[0].weight.grad is None  # targets are detached


def test_a_tower_that_trains_runs_once_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets of what the forward has encoded are those of pictures that are encoded once more for them."""
    step = step_of({**ALL, "encoders.*": 1e-4}, **OPTIONS)
    vlm, runs = step.vlm, []
    vlm.encoders["image"].register_forward_hook(lambda *_: runs.append(1))
    batch = vlm.processor.collator()(SAMPLES)
    run, found = vlm.run, []

    def run_and_encode_again(batch: Batch, **more: Any) -> Output:
        output = run(batch, **more)
        with torch.no_grad():
            output.encoded = {kind: vlm.encode(kind, media) for kind, media in batch.media.items()}
        return output

    for way in (run, run_and_encode_again):
        monkeypatch.setattr(vlm, "run", way)
        torch.manual_seed(5)
        loss, shares = step(batch, step.scales([batch]))
        loss.backward()
        grads = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **shares, **grads})
        step.zero_grad()
        assert len(runs) == (1 if way is run else 3)
    assert any("encoders" in name for name in found[0]) and found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="the joint llava has no head that tells vectors"):
        step_of({"connectors.*": 1e-3}, joint="llava")
    with pytest.raises(ConfigError, match="the token pool does not train"):
        step_of({"connectors.*.inner.*": 1e-3, "heads.*": 1e-3}, **OPTIONS)


def test_the_recipe_replaces_in_its_own_stage_alone(tmp_path: Path) -> None:
    changes = {"data": (str(composed.questions(tmp_path, 8)),), "budget": {"steps": 2}, "batch_size": 4}
    legs = [stage.but(**changes) for stage in victor().stages[1:]]
    made = composed.recipe("llama", "victor", OPTIONS).but(stages=legs, dtype="float32")
    assert train(made, tmp_path / "run", torch.device("cpu")) is not None
    newborn = composed.model("llama", "victor", OPTIONS).state_dict()
    models = [isthmus.load(tmp_path / "run" / leg.name / "model").state_dict() for leg in legs]
    states = [newborn, *models]
    for name, moves in {
        "connectors.image.pool": [False, True, False],
        "heads.tell.weight": [False, True, False],
        "connectors.image.inner.layers.0.weight": [True, True, True],
    }.items():
        assert [not torch.equal(one[name], two[name]) for one, two in itertools.pairwise(states)] == moves, name
