"""Regions in questions and answers: where is it (REC), and what is there (REG), over scenes whose boxes are exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from isthmus.config import TaskConfig
from isthmus.data.boxes import overlap
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.score import Scorer
from isthmus.evaluation.tasks import Advance, Builder, Choice, Free, Item, Likelihood, of_scenes
from isthmus.types import Box, Image, Sample, Turn

ENOUGH = 0.5
"""Intersection over union from which a region is right, as RefCOCO is scored."""


@dataclass(frozen=True)
class Locate(Free):
    """The first region of a free reply covers the true one; a reply without a region is wrong."""

    longest: int = field(default=48, kw_only=True)

    @property
    def rule(self) -> str:
        return f"first region of a free reply has an intersection over union of {ENOUGH} or more with the true one"

    def score(
        self, scorer: Scorer, item: Item, prompt: Sample, reply: str | None
    ) -> tuple[bool | None, tuple[float, ...]]:
        """As in `Free`; the score is the intersection over union, 0 for a reply without a region."""
        *_, picture = (medium for medium in prompt.media if isinstance(medium, Image))  # examples come before it
        boxes = scorer.model.processor.regions.read(reply or "", picture)
        share = overlap(boxes[0], truth(item)) if boxes else 0.0
        return None if reply is None else share >= ENOUGH, (share,)


@dataclass(frozen=True)
class Refer(Likelihood):
    """How surprising the named thing with its region is, written as the model writes regions."""

    def predict(self, scorer: Scorer, prompts: Sequence[Sample], advance: Advance | None) -> list[Prediction]:
        spell = scorer.model.processor.regions.spell
        answers = [
            spell((*prompt.turns, Turn.say("assistant", _labelled(item))))[-1].text
            for item, prompt in zip(self.items, prompts)
        ]
        items = tuple(replace(item, answer=answer) for item, answer in zip(self.items, answers))
        return Likelihood.predict(replace(self, items=items), scorer, prompts, advance)


def _labelled(item: Item) -> Box:
    (name,) = (name for name, region in item.prompt.meta["boxes"] if region == item.prompt.meta["box"])
    return Box(item.prompt.meta["box"], f"the {name}")


def truth(item: Item) -> Box:
    """The region that an item asks for."""
    return Box(item.prompt.meta["box"])


def rec(task: TaskConfig, seed: int) -> Locate:
    """Where a named thing is."""
    return of_scenes(Locate, task, seed, "refer", f"Referring, IoU >= {ENOUGH}")


def rec_nll(task: TaskConfig, seed: int) -> Refer:
    """How surprising the answer to `rec` is: it tells models apart that do not hit regions yet."""
    return of_scenes(Refer, task, seed, "refer", "Referring, NLL")


def reg(task: TaskConfig, seed: int) -> Choice:
    """What is in a region, one of ten names; the others that are in the picture are among them."""
    return of_scenes(Choice, task, seed, "region", "Naming a region")


TASKS: dict[str, Builder] = {"rec": rec, "rec-nll": rec_nll, "reg": reg}
