"""What must not matter: how a step is cut into rows and micro-batches, and who else is in a row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import composed
import test_contract  # noqa: F401 - registers its joints
from composed import picture, sample, stir
from isthmus import graft, kernels, sites
from isthmus.config import LoRA, ObjectiveConfig
from isthmus.data.mix import Batches, Mix
from isthmus.model import VLM
from isthmus.training.step import Step
from isthmus.types import IGNORE, Batch, Sample, Turn
from test_graft import Expert


def one(number: int) -> Sample:
    """Every third without a picture, every fourth with two; lengths and routes vary."""
    pictures = [picture(number + 20 * place) for place in range(0 if number % 3 == 2 else 1 + (number % 4 == 3))]
    question = "what is it?" + " look again" * (number * 7 % 5)
    made = sample(*pictures, question, answer="a cat" + " on the left" * (number % 4), route=number % 2)
    return made.but(id=f"s{number}")


SAMPLES = [one(number) for number in range(16)]


def joined(kind: str) -> VLM:
    """A model whose connector trains, and what `kind` adds; the additions have moved away from their birth."""
    torch.manual_seed(0)  # connectors and LoRA are born at random; wild ones are badly conditioned
    model = composed.model("qwen3" if kind == "qwen3" else "llama", "aside" if kind == "aside" else "llava")
    if kind == "lora":
        model.add_lora(["llm.*.q_proj", "llm.*.down_proj"], LoRA(r=4), "small")
    if kind == "expert":
        for layer in sites.layers(model.llm).modules:
            graft.graft(model, layer.mlp.up_proj, "expert", Expert(layer.mlp.up_proj))
        model._lends_side = True  # an aligner that adds grafts sees to it
    model.requires_grad_(False)
    for name, parameter in stir(model).named_parameters():
        parameter.requires_grad_(kind in ("plain", "recompute", "qwen3") or ".grafts." in name or "connectors" in name)
    model.encoders.requires_grad_(False)
    return model


def gradient(step: Step, batches: list[Batch]) -> torch.Tensor:
    """The gradient of an optimizer step, all parameters end to end."""
    step.zero_grad()
    scales = step.scales(batches)
    for batch in batches:
        step(batch, scales)[0].backward()
    return torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None])


def by_hand(model: VLM, samples: list[Sample]) -> torch.Tensor:
    """The same from each sample alone: the mean over all supervised tokens, written out."""
    model.zero_grad()
    losses, count = [], 0
    for each in samples:
        batch = model.processor.collator()([each])
        output = model.run(batch)
        assert output.hidden_BTD is not None and batch.labels_BT is not None
        logits, target = output.head(output.hidden_BTD[0, :-1]), batch.labels_BT[0, 1:]
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum"))
        count += int((target != IGNORE).sum())
    (torch.stack(losses).sum() / count).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cut(model: VLM, batching: Any, micros: int) -> list[Batch]:
    """The 16 samples as a stage would read them."""
    collator = model.processor.collator()
    batches = Batches(
        Mix([range(16)], [1], 0), 16, batching, lambda ref: collator.lengths(SAMPLES[ref[1]]), window=1,
        max_length=200, least=micros,
    )  # fmt: skip
    rows = batches.rows(0)
    return [collator.rows([[SAMPLES[ref[1]] for ref in row] for row in rows[k::micros]]) for k in range(micros)]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("micros", [1, 2, 16], ids=["1x16", "2x8", "16x1"])
def test_accumulation_and_batching_do_not_change_the_gradient(micros: int) -> None:
    model = joined("plain")
    step, expected = Step(model, [ObjectiveConfig(name="lm")]), by_hand(model, SAMPLES)
    for batching in ("shuffled", "bucketed", "packed"):
        batches = cut(model, batching, micros)
        assert sorted(name for batch in batches for name in batch.ids) == sorted(each.id for each in SAMPLES)
        assert (max(int(batch.segment_BT.max()) for batch in batches) > 1) == (batching == "packed" and micros < 16)
        close(gradient(step, batches), expected)


@pytest.mark.parametrize("kind", ["qwen3", "recompute", "lora", "aside", "expert"])
def test_packed_gradients_are_those_of_single_samples(kind: str) -> None:
    model = joined(kind)
    step, expected = Step(model, [ObjectiveConfig(name="lm")]), by_hand(model, SAMPLES)
    if kind == "recompute":
        step.recompute()
        step.ready()
    close(gradient(step, cut(model, "packed", 2)), expected, tolerance=2e-6)  # LoRA's: 1.1e-6


def branching(first: Sample, *endings: tuple[str, str]) -> Sample:
    """More questions about the pictures of a sample."""
    turns = [(Turn.say("user", *first.media, ask), Turn.say("assistant", answer)) for ask, answer in endings]
    return first.but(branches=tuple(turns))


ROWS = [SAMPLES[:5], SAMPLES[5:7], SAMPLES[7:10]]
BRANCHED = [[branching(SAMPLES[0], ("and what colour is it?", "red")), SAMPLES[2], SAMPLES[3]], SAMPLES[4:6]]


@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS, BRANCHED], ids=["whole", "branched"])
@pytest.mark.parametrize("kind", ["plain", "qwen3", "lora", "aside", "expert"])
def test_packed_logits_are_those_of_single_samples(kind: str, rows: list[list[Sample]]) -> None:
    model = joined(kind)
    collator = model.processor.collator()
    batch = collator.rows(rows)
    packed = logits(model, batch)
    for row, samples in enumerate(rows):
        for segment, each in enumerate(samples, start=1):
            alone = logits(model, collator([each]))[0]
            found = packed[row, batch.segment_BT[row] == segment]
            assert (found - alone).abs().max() <= 1e-5 * alone.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "aside"])
@pytest.mark.parametrize("victim", [1, 3])
def test_nothing_is_seen_of_the_others_in_a_row(kind: str, victim: int) -> None:
    """Another picture and another word in one sample leave every other sample bit-equal, and that one not."""
    model = joined(kind)
    batch = model.processor.collator().rows([SAMPLES[:5], SAMPLES[5:7]])
    before = logits(model, batch)
    images, its = batch.media["image"], batch.segment_BT[0] == victim + 1
    mine = (images.row_N == 0) & (images.segment_N == victim + 1)
    assert batch.media["image"].pixels is not None and mine.any()
    pixels = torch.where(mine[:, None, None, None], images.pixels.flip(-1), images.pixels)
    ids_BT = batch.input_ids_BT.clone()
    ids_BT[0, its.nonzero()[-1]] += 1
    changed = replace(batch, input_ids_BT=ids_BT, media={"image": replace(images, pixels=pixels)})
    after = logits(model, changed)
    assert torch.equal(before[1], after[1]) and torch.equal(before[0, ~its], after[0, ~its])
    assert not torch.allclose(before[0, its], after[0, its], atol=1e-2)


def test_routes_reach_every_segment_of_a_packed_row() -> None:
    model = joined("aside")
    collator = model.processor.collator()
    batch = collator.rows([SAMPLES[:3]])
    assert batch.route_BT is not None
    turned = replace(batch, route_BT=torch.where(batch.segment_BT == 2, 1 - batch.route_BT, batch.route_BT))
    before, after = logits(model, batch), logits(model, turned)
    other = batch.segment_BT == 2
    assert torch.equal(before[~other], after[~other]) and not torch.allclose(before[other], after[other], atol=1e-3)


def test_no_dense_mask_is_made_for_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cost is the reason for the kernel; a joint's own rule or branches still take one."""
    model, made = joined("plain"), []
    genuine = kernels.sdpa_mask
    monkeypatch.setattr(kernels, "sdpa_mask", lambda **more: made.append(more["kv_length"]) or genuine(**more))
    collator = model.processor.collator()
    logits(model, collator.rows(ROWS))
    assert not made
    logits(model, collator.rows(BRANCHED))
    assert made


def logits(model: VLM, batch: Batch) -> torch.Tensor:
    output = model.run(batch)
    assert output.hidden_BTD is not None
    return output.head(output.hidden_BTD)
