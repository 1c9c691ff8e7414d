"""Demonstrations in front of a question: any task at 0, 4, 8 or 16 shots, as Flamingo measures what context teaches.

Alayrac et al. 2022, arXiv 2204.14198 (Flamingo); Awadalla et al. 2023, arXiv 2308.01390 (OpenFlamingo).
Official code: github.com/mlfoundations/open_flamingo, `open_flamingo/eval`.

Which demonstrations an item gets depends on the seed and on the item's name, never on its answer:

- they come from the training split, in an order that the seed draws; more shots put more in front of the same ones;
- no two show the same thing (`cluster`: a concept that is shown alone, else a picture), and none shows the item's;
- one that was asked with the item's very choices may have any answer: leaving the right one out would give it away;
- of others, none has an answer that is among the item's choices, so that no choice is a demonstration's either. Without
  choices, none has the item's answer.

Pictures of demonstrations are part of the prompt, so that the blind and shuffled controls change them too.

Differs: drawn per item by the seed; retrieval by likeness (RICES) is not there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from pydantic import Field

from isthmus.config import Frozen, OneSource, TaskConfig, check
from isthmus.data.documents import unasked
from isthmus.data.mix import permuted
from isthmus.evaluation import catalogue, files, tasks
from isthmus.evaluation.tasks import Cut, Item, Task
from isthmus.prepare import tags
from isthmus.types import ConfigError, DataError, Sample, Turn

Beside: TypeAlias = Callable[[Sample], Sample]
"""Puts something beside the pictures of a sample, such as tags."""

TEXTS = 2
"""Demonstrations without their pictures that stand for zero shots in Flamingo's sense."""


class Shots(Frozen):
    """Options that any task takes beside its own."""

    shots: int = Field(ge=0)
    """Demonstrations, each with its picture."""
    zero: Literal["nothing", "texts"] = "nothing"
    """At 0 shots: the question alone, or behind two demonstrations without their pictures, which show the form of an
    answer and nothing else (Flamingo's zero shots)."""
    asked: bool = True
    """Keep the questions; otherwise pictures stand alone, and only demonstrations tell what is wanted."""
    of: OneSource | None = None
    """Where demonstrations come from; None is the training split of the task's own set."""


def _nothing(sample: Sample) -> Sample:
    return sample


def build(config: TaskConfig, seed: int, beside: Beside = _nothing) -> Task:
    """A task, with demonstrations in its prompts where its options name `shots`; `beside` is for the pictures of both.

    Raises:
        ConfigError: no such task or option, or nothing to draw this task's demonstrations from.
        DataError: there are too few demonstrations.
    """
    own = {name: value for name, value in config.options.items() if name in Shots.model_fields}
    rest = {name: value for name, value in config.options.items() if name not in own}
    task = catalogue.named(config.name)(config.but(options=rest), seed)
    if not own:
        return replace(task, items=tuple(replace(item, prompt=beside(item.prompt)) for item in task.items))
    how = check(Shots, own, f"task {config.name}")
    source = how.of or task.training
    if source is None:
        raise ConfigError(
            f"task {config.name!r} has no training split of its own", "name a data set in options.of of the task"
        )
    return shown(task, tags.open_set(source, seed), how, seed, beside)


def shown(task: Task, shelf: Sequence[Sample], how: Shots, seed: int, beside: Beside = _nothing) -> Task:
    """The task with demonstrations from `shelf` in front of every item; its name and rows say how many."""
    count = TEXTS if how.shots == 0 and how.zero == "texts" else how.shots
    label = "1 shot" if how.shots == 1 else f"{how.shots} shots"
    items = tuple(
        replace(item, prompt=_prompt(item.prompt, _draw(item, shelf, count, seed), how, beside)) for item in task.items
    )
    cuts = tuple(Cut(f"{cut.label}, {label}", cut.kinds) for cut in task.cuts)
    return replace(task, name=f"{task.name}-{how.shots}-shots", items=items, cuts=cuts, cosine=False)


def _draw(item: Item, shelf: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """The item's first `count` demonstrations, the first one nearest to the question."""
    found: dict[str, Sample] = {}
    order = _order(item, shelf, seed)
    while len(found) < count:
        sample = next(order, None)
        if sample is None:
            raise DataError(
                f"{item.prompt.id}: {len(found)} of {count} demonstrations that do not give the answer away",
                "lower `shots`, or name a larger set in `of`",
            )
        one = tasks.item(sample) if "cluster" in sample.meta else files.item(sample)
        if one.cluster != item.cluster and not _tells(one, item):
            found.setdefault(one.cluster, sample)
    return list(found.values())


def _order(item: Item, shelf: Sequence[Sample], seed: int) -> Iterator[Sample]:
    """The whole shelf in an order of the item's own."""
    key = int.from_bytes(hashlib.sha256(item.prompt.id.encode()).digest()[:8])
    return (shelf[permuted(place, len(shelf), (seed, key))] for place in range(len(shelf)))


def _tells(one: Item, item: Item) -> bool:
    """Whether a demonstration says, or rules out, one of the item's choices."""
    if item.choices and set(one.choices) == set(item.choices):
        return False
    return bool(one.answer) and one.answer in (item.choices or (item.answer,))  # a region is an answer without words


def _prompt(asked: Sample, demonstrations: Sequence[Sample], how: Shots, beside: Beside) -> Sample:
    """System turn, demonstrations, question."""
    head = [turn for turn in asked.turns[:1] if turn.role == "system"]
    told = [_worded(one, how) for one in reversed(demonstrations)]
    if how.shots == 0:
        told = [one.but(turns=tuple(map(_without_media, one.turns))) for one in told]
    turns = [turn for one in (*told, _worded(asked, how)) for turn in beside(one).turns]
    return asked.but(turns=(*head, *turns))


def _worded(sample: Sample, how: Shots) -> Sample:
    """Without its system turn."""
    turns = [turn for turn in sample.turns if turn.role != "system"]
    return sample.but(turns=tuple(turns if how.asked else map(unasked, turns)))


def _without_media(turn: Turn) -> Turn:
    return replace(turn, parts=tuple(part for part in turn.parts if part not in turn.media))
