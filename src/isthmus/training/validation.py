"""The validation of a stage: its own loss on samples held out of its sources, each source by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.config import Source, Stage
from isthmus.data import sets
from isthmus.data.collate import Collator
from isthmus.data.mix import by_size
from isthmus.prepare import tags
from isthmus.training.step import Step, held_out
from isthmus.types import NothingToLearn, Sample

HELD_OUT = 64
"""Validation samples of a stage, as many from each of its sources."""


@dataclass(frozen=True)
class Validation:
    """The loss on each source, and the mean of these by the sources' weights.

    So a source counts for as much as it does in training, however long its answers are.

    Args:
        losses: of every source, see `step.held_out`.
        weights: how often they are drawn, relative to each other.
    """

    losses: Mapping[str, Callable[[Step], float]]
    weights: Mapping[str, float]

    def __call__(self, step: Step) -> dict[str, float]:
        """`validation_loss`, and where sources are several, `validation_loss_NAME` of each that a term is about.

        Raises:
            NothingToLearn: no term is about any of them.
            DataError: a sample of theirs cannot be read.
        """
        found = dict[str, float]()
        for name, loss in self.losses.items():
            with contextlib.suppress(NothingToLearn):
                found[name] = loss(step)
        if not found:
            raise NothingToLearn(
                "nothing to learn from in the samples held out: no token is supervised",
                "`isthmus data preview` shows what is trained in each sample",
            )
        whole = sum(self.weights[name] for name in found)
        mean = sum(self.weights[name] * each for name, each in found.items()) / whole
        told = {f"validation_loss_{name}": each for name, each in found.items() if len(self.losses) > 1}
        return {"validation_loss": mean, **told}


def of(stage: Stage, opened: Sequence[sets.Set], collator: Collator, seed: int) -> Validation | None:
    """The validation of a stage, as many samples at once as in training; None if all are dropped as too long."""
    count, size = -(-HELD_OUT // len(stage.data)), stage.batch_size // stage.accumulate
    losses, shares = dict[str, Callable[[Step], float]](), dict[str, float]()
    for number, (source, weight) in enumerate(zip(stage.data, weights(stage, opened)), start=1):
        samples = [sample for sample in _spread(source, seed, count) if collator.lengths(sample)]
        if not samples:
            continue
        name = Path(source.name).name
        name = f"{name}_{number}" if name in losses else name
        losses[name] = held_out([collator(samples[start : start + size]) for start in range(0, len(samples), size)])
        shares[name] = weight
    return Validation(losses, shares) if losses else None


def weights(stage: Stage, opened: Sequence[sets.Set]) -> list[float]:
    """How often a stage's sources are drawn, relative to each other."""
    return by_size([source.weight for source in stage.data], opened, stage.mixing or 0.0)


def _spread(source: Source, seed: int, count: int) -> list[Sample]:
    """So many of the samples held out of a source, evenly over all of them."""
    opened = tags.open_set(source.but(split="val", limit=None), seed)
    return list(opened[:: max(1, len(opened) // count)])[:count]
