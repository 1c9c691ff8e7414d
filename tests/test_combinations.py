"""Every joint together with objectives beside the first one, ways of training, and ways of batching.

Which combinations are tried is a covering of all pairs of choices, drawn by a seed; each is one training step of a
tiny model, whole, packed or not, and recomputed or not. What cannot go together refuses before anything runs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import composed
import test_contract as contract
from composed import MIX, picture, sample, stir
from isthmus.config import Budget, LoRA, ObjectiveConfig, Stage
from isthmus.data.collate import Collator
from isthmus.data.mix import Batches, Batching, Mix
from isthmus.model import VLM
from isthmus.recipes.blip2 import TEXT_HALF
from isthmus.training import combination
from isthmus.training.optimizer import choose
from isthmus.training.step import Step
from isthmus.types import Batch, ConfigError
from tiny import ENCODER_DECODERS

SAMPLES = (*MIX, sample("see", picture(4), "say it", answer="two dogs", route=1))
TERMS = {
    "lm": ("lm",),
    "lm+contrastive": ("lm", "contrastive"),
    "lm+vdep": ("lm", "vdep"),
    "text": ("itc", "itm", "itg"),
}
OPTIONS: dict[str, dict[str, Any]] = {"vdep": {"ratio": 1.0, "shift": 0}}
TRAIN: dict[str, dict[str, Any]] = {
    "joint": {},
    "lora": {"attention": {"mode": LoRA(r=2)}},
    "dora+layer": {"layer": 1e-3, "attention": {"mode": LoRA(r=2, dora=True)}},
}
BATCHING = ("bucketed", "shuffled", "packed")
WHOLE = {**contract.SMALL_QUERIES, "text": True, "vocabulary": 321, "length": 8}
JOINTS = {name: joint for name, joint in contract.JOINTS.items() if joint.terms == ("lm",)}
JOINTS["blip2-text"] = contract.Joint("blip2", WHOLE, ("llama", "opt"))


def covering(factors: Sequence[Sequence[str]], seed: int) -> list[tuple[str, ...]]:
    """Rows in which every pair of choices of two factors occurs; greedy, the best of a few drawn candidates."""
    dice = random.Random(seed)
    sides = list(itertools.combinations(range(len(factors)), 2))
    missing = {(i, a, j, b) for i, j in sides for a in factors[i] for b in factors[j]}
    rows = []
    while missing:
        i, a, j, b = min(missing)
        candidates = []
        for _ in range(20):
            row = [dice.choice(factor) for factor in factors]
            row[i], row[j] = a, b
            candidates.append(tuple(row))
        row = max(candidates, key=lambda row: len(missing & pairs(row, sides)))
        missing -= pairs(row, sides)
        rows.append(row)
    return rows


def pairs(row: Sequence[str], sides: Sequence[tuple[int, int]]) -> set[tuple[int, str, int, str]]:
    return {(i, row[i], j, row[j]) for i, j in sides}


def cases() -> Iterator[Any]:
    """Families take turns, so that every family of a joint meets something."""
    seen: dict[str, int] = {}
    for joint, terms, train, batching in covering([tuple(JOINTS), tuple(TERMS), tuple(TRAIN), BATCHING], seed=0):
        families = JOINTS[joint].families
        family = families[seen.setdefault(joint, 0) % len(families)]
        seen[joint] += 1
        yield pytest.param(joint, family, terms, train, batching, id="-".join((joint, family, terms, train, batching)))


def unfit(joint: str, family: str, terms: str, batching: str, vlm: VLM) -> str | None:
    """Why this cannot go together, by facts of the parts alone."""
    if terms == "text" and joint != "blip2-text":
        return "reads no captions"
    if family in ENCODER_DECODERS:
        if terms == "lm+contrastive":
            return "contrastive reads labels beside the media"
        if terms == "lm+vdep":
            return "no places of pictures"
        if batching == "packed":
            return "packed rows"
    if not vlm.aligner.splices:
        return {"lm+vdep": "no places of pictures", "lm+contrastive": "are no words"}.get(terms)
    if joint == "keys" and terms == "lm+vdep":
        return "stay what was put in"
    return None


def stage_of(vlm: VLM, terms: str, train: str, batching: str) -> Stage:
    places = {"attention": contract.attention_glob(vlm), "layer": f"llm.{contract.sites.layers(vlm.llm).path}.1.*"}
    globs = {"connectors.*": 1e-3, **{places[place]: how for place, how in TRAIN[train].items()}}
    if vlm.aligner.name == "blip2" and vlm.aligner.options.text:  # as in BLIP-2's recipe: each stage its part
        idle = ("project.*",) if terms == "text" else TEXT_HALF
        globs |= {f"connectors.*.{glob}": {"mode": "frozen"} for glob in idle}
    return Stage(
        name="one",
        data=("none",),
        objectives=tuple(ObjectiveConfig(name=name, options=OPTIONS.get(name, {})) for name in TERMS[terms]),
        train=globs,
        batching=batching,
        batch_size=len(SAMPLES),
        budget=Budget(steps=1),
    )


def batches(collator: Collator, batching: Batching) -> Batches:
    """All samples at every step, in the order and the rows of a way of batching."""
    mix = Mix([SAMPLES], [1.0], 0)
    return Batches(mix, len(SAMPLES), batching, lambda ref: collator.lengths(SAMPLES[ref[1]]), window=1)


def gradients(step: Step, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one step; what is drawn in it is drawn from the same seed."""
    step.zero_grad()
    step.ready()
    torch.manual_seed(0)
    loss, _ = step(batch, step.scales([batch]))
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("joint", "family", "terms", "train", "batching"), cases())
def test_a_combination_learns_or_refuses(joint, family, terms, train, batching):
    one = JOINTS[joint]
    made = composed.recipe(family, one.aligner, one.options, **one.encoder)
    vlm = composed.model(family, one.aligner, one.options, **one.encoder)
    stage = stage_of(vlm, terms, train, batching)
    made = made.but(stages=(stage,))
    reason = unfit(joint, family, terms, batching, vlm)
    if reason:
        with pytest.raises(ConfigError, match=f"stage one: .*({reason})") as refused:
            combination.check(made, vlm, torch.device("cpu"))
        assert refused.value.remedy
        return
    combination.check(made, vlm, torch.device("cpu"))
    step = Step(vlm, stage.objectives)
    chosen = choose(step, stage)
    stir(vlm)
    step.accompany()
    collator = vlm.processor.collator()
    rows = batches(collator, batching).rows(0)
    batch = collator.rows([[SAMPLES[index] for _, index in row] for row in rows])
    assert sorted(index for row in rows for _, index in row) == list(range(len(SAMPLES)))
    assert (batch.segment_BT.max() > 1) == (batching == "packed")

    loss, found = gradients(step, batch)
    assert 0 < loss < 100
    trained = {each.name for each in chosen}
    assert trained <= {name for name, p in step.named_parameters() if p.requires_grad}
    silent = {name for name in trained if name not in found or not found[name].any()}
    if terms != "text":
        assert not silent
    assert all(torch.isfinite(gradient).all() for gradient in found.values())

    if terms != "text":  # negatives and hidden words are drawn in the batch's order
        alone_loss, alone = gradients(step, collator(SAMPLES))
        assert loss == pytest.approx(alone_loss, abs=1e-5, rel=1e-5)
        same(found, alone, 2e-4)

    step.recompute()
    again_loss, again = gradients(step, batch)
    assert again_loss == loss
    same(found, again, 0)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal to within a share of each gradient's largest entry; some, such as a key bias's, are rounding alone."""
    assert one.keys() == other.keys()
    floor = 1e-3 * max(1.0, *(float(gradient.abs().max()) for gradient in one.values()))
    for name, gradient in one.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=tolerance * max(largest, floor), msg=name)


def test_the_covering_covers():
    factors = [("a", "b", "c", "d"), ("e", "f"), ("g", "h", "i"), ("j", "k", "l")]
    rows = covering(factors, seed=1)
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(factors[i], factors[j]))
    assert rows == covering(factors, seed=1) and len(rows) <= 20
