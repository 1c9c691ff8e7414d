"""The batches that a stage would begin with, of its own data and without features; assumed where these are not here.

A recipe in its authors' size names data and a tokenizer that are not on this machine. Its batches are then assumed: one
picture per sample beside `costs.TEXT` text tokens, the latter half of which is learnt; no picture where all terms of
the loss learn from samples without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus import costs, objectives, planning
from isthmus.config import Recipe, Stage
from isthmus.data import sets
from isthmus.forecast.calibrate import now
from isthmus.model import VLM
from isthmus.objectives.lm import supervised
from isthmus.training.run import Feed, encodes_anew, limits, mix_of
from isthmus.types import IGNORE, Batch, Features, Media, Medium, Reading

SAMPLES, STEPS = 1024, 32
"""How many samples are looked at, and over how many steps they are spread at least."""


@dataclass(frozen=True)
class Drawn:
    """Batches of a stage: per optimizer step, its micro-batches."""

    steps: list[list[Batch]]
    epoch: int | None
    """Samples of the stage's sets; None where batches are assumed."""
    seconds: float
    """To collate one step."""

    @property
    def assumed(self) -> bool:
        return self.epoch is None

    @property
    def volumes(self) -> list[int]:
        """Positions of each step, padding included, which its cost nearly follows."""
        return [sum(_volume(batch) for batch in step) for step in self.steps]

    def per_sample(self) -> dict[str, float]:
        """Tokens, learnt tokens and media of a sample, and the share of positions that is padding."""
        every = [batch for step in self.steps for batch in step]
        samples = sum(len(batch.ids) for batch in every)
        tokens = sum(int((batch.segment_BT > 0).sum()) for batch in every)
        positions = sum(batch.segment_BT.numel() for batch in every)
        learnt = sum(int(supervised(batch).sum()) for batch in every)
        media = sum(len(media) for batch in every for media in batch.media.values())
        return {
            "tokens": tokens / samples,
            "learnt": learnt / samples,
            "media": media / samples,
            "padding": 1 - tokens / positions,
        }


def draw(recipe: Recipe, stage: Stage, model: VLM, steps: int | None) -> Drawn:
    """Batches from a stage's beginning; `steps` are those it lasts, if that is known.

    Raises:
        ConfigError, DataError, IsthmusError: its data are there but wrong, or not fetched.
    """
    anew = encodes_anew(recipe, model)
    if not _here(recipe, stage):
        return Drawn([_assumed(model, stage, anew)], None, 0.0)
    data = mix_of(stage, recipe.seed)
    model.processor = planning.processor(model, recipe)
    look = Hollow(model, anew)
    collate = model.processor.collator(look, stage.template, **limits(stage))
    feed = Feed(stage, data, collate, recipe.seed)
    wanted = max(STEPS, SAMPLES // stage.batch_size)
    last = wanted if steps is None else min(wanted, steps)
    feed(0, 0)  # features are probed once
    drawn, collating = [], 0.0
    for step in range(0, last, max(1, last * stage.batch_size // SAMPLES)):
        feed.around(step)  # not timed: samples are rendered for their lengths in the first epoch alone
        began = now()
        drawn.append([feed(step, micro) for micro in range(feed.micros)])
        collating += now() - began
    return Drawn(drawn, data.mix.epoch_length, collating / len(drawn))


class Hollow:
    """A collator's `look` that gives features, or pixels where they are encoded in every step, without numbers."""

    def __init__(self, model: VLM, anew: bool):
        self.model, self.anew = model, anew
        self.features: dict[str, Features] = {}

    def __call__(self, kind: str, media: Sequence[Medium]) -> tuple[Tensor | None, Features | None]:
        if self.anew:
            return self.model.encoders[kind].blank().to("meta").expand(len(media), -1, -1, -1).clone(), None
        if kind not in self.features:
            self.features[kind] = probe(self.model, kind)
        one = self.features[kind]
        return None, one.map(lambda x: x.expand(len(media), *x.shape[1:]).contiguous())


@torch.no_grad()
def probe(model: VLM, kind: str) -> Features:
    """The features of one medium, without numbers."""
    first = torch.zeros(1, dtype=torch.long)
    media = Media(row_N=first, segment_N=first + 1, at_N=first, pixels=model.encoders[kind].blank().to("meta"))
    with costs.NoNumbers():
        return model.encode(kind, media)


def _here(recipe: Recipe, stage: Stage) -> bool:
    """Whether the tokenizer and the stage's files are on this machine; nothing is downloaded for a plan."""
    described = recipe.llm.architecture is not None and not Path(recipe.llm.source).is_dir()
    return not described and all(map(sets.here, stage.data))


def _assumed(model: VLM, stage: Stage, anew: bool) -> list[Batch]:
    rows = stage.batch_size // stage.accumulate
    terms = (objectives.named(term.name, term.options) for term in stage.objectives)
    kind = None if all(term.unpictured for term in terms) else "image"
    one = costs.prompt(model, kind)

    def many(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(rows, -1).contiguous()

    ids_BT = one.input_ids_BT.expand(rows, -1).contiguous()
    told_BT = ids_BT
    if one.decoder_ids_BU is not None:
        told_BT = torch.zeros(rows, costs.TEXT // 2, dtype=torch.long)
    reading = model.aligner.reading()
    labels_BT = torch.full_like(told_BT, IGNORE)
    labels_BT[:, -costs.TEXT // 2 :] = 0
    batch = replace(
        one,
        input_ids_BT=ids_BT,
        segment_BT=torch.ones_like(ids_BT),
        modality_BT=one.modality_BT.expand(rows, -1).contiguous(),
        labels_BT=labels_BT,
        decoder_ids_BU=None if one.decoder_ids_BU is None else told_BT,
        media={} if kind is None else {kind: _shown(model, one.media[kind], rows, anew)},
        extra_text={} if reading is None else {kind or "text": _read(reading, rows)},
        ids=tuple(map(str, range(rows))),
    )
    return [batch] * stage.accumulate


def _shown(model: VLM, one: Media, rows: int, anew: bool) -> Media:
    """A medium in every row at the same place: cached features, or pixels where they are encoded in every step."""
    row_N = torch.arange(rows)
    features = None if anew else probe(model, "image").map(lambda x: x.expand(rows, *x.shape[1:]))
    pixels = None if features is not None else one.pixels.to("meta").expand(rows, -1, -1, -1)  # type: ignore[union-attr]
    return Media(row_N, torch.ones_like(row_N), one.at_N.expand(rows), pixels, features)


def _read(reading: Reading, rows: int) -> Tensor:
    """What connectors read: as many ids as are asked or answered, and no two rows alike, so that terms can tell them
    apart; no vocabulary is asked for them."""
    said = costs.TEXT if reading.of == "question" else costs.TEXT // 2
    return torch.arange(rows)[:, None].repeat(1, min(said, reading.length))


def row_bytes(model: VLM) -> int:
    """Bytes of one medium's cached features, of all kinds together, in the weights' dtype."""
    every = [probe(model, kind) for kind in model.encoders]
    return sum(x.nbytes for one in every for x in (one.x_NSE, *one.taps.values()))


def _volume(batch: Batch) -> int:
    told = 0 if batch.decoder_ids_BU is None else batch.decoder_ids_BU.numel()
    return batch.input_ids_BT.numel() + told
