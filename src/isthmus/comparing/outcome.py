"""What a comparison found, as plain values: a line per task with a cell per joint, costs, runs, contrasts, settings.

`Outcome.plain` is what `compare.json` holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from PIL import Image as Pillow

from isthmus.comparing.settings import Setting
from isthmus.comparing.speed import Speed
from isthmus.evaluation.results import Column, Credit, as_plain
from isthmus.evaluation.seeds import Gap, Level, Verdict

NEAR = 0.05
"""How far from the operations asked for is still what was asked, as a share."""
Points: TypeAlias = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Cell:
    """One joint on one line of the table."""

    level: Level
    others: Mapping[Column, Level]
    """Before training, and the controls."""
    seen: Gap | None
    """How much better than with a blank picture; None where that was not measured."""
    gap: Gap | None = None
    """From the baseline; None for the baseline itself."""
    adjusted: float | None = None
    """The gap's p-value after correction for all that is compared."""
    verdict: Verdict | None = None
    unscored: int = 0
    besides: Mapping[str, float] = field(default_factory=dict)
    """Further figures of a benchmark, means over seeds; none where an item is not scored."""


def sees(seen: Gap | None) -> bool:
    """Whether a picture clearly helps, or it was not measured whether it does."""
    return seen is None or (seen.p <= 0.05 and seen.value > 0)


@dataclass(frozen=True)
class Line:
    """One task, or the mean over tasks, over all joints."""

    task: str
    label: str
    unit: str
    items: int
    clusters: int
    cells: Mapping[str, Cell]
    chance: float | None = None
    paired: bool = True
    """Whether all joints answered the same items under each seed."""

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return self.unit == "accuracy"

    def same(self, other: Line) -> bool:
        """Whether it is the same question: the mean over one task is that task."""
        return (self.task, self.label) == (other.task, other.label)


@dataclass(frozen=True)
class Cost:
    """What a joint costs: counted on its structure, added up from its logs, and measured on its model."""

    parameters: int
    trained: int
    """In any of its stages."""
    training: float
    """Operations of one run, its steps times what `plan` counts of one (its log's where none could), the mean over
    seeds."""
    seconds: float
    """Of training, encoding and validation aside, the mean over seeds."""
    samples: float
    memory: float
    """Peak bytes of the process or the accelerator while a stage trains, the largest of all seeds."""
    encoder: int
    joint: int
    llm: int
    """Operations of a prefill with one picture, see `costs`."""
    cache: int
    aside: int
    """Bytes that a picture occupies while an answer is written, in bfloat16."""
    positions: int
    speed: Speed | None = None

    @property
    def prefill(self) -> int:
        return self.encoder + self.joint + self.llm

    @property
    def kept(self) -> int:
        return self.cache + self.aside

    @property
    def share(self) -> float:
        return self.trained / self.parameters


@dataclass(frozen=True)
class Machine:
    """What a run was done on, as its report says."""

    processor: str
    threads: int
    device: str

    @property
    def kind(self) -> str:
        """The device, whichever of several like it."""
        return self.device.partition(":")[0]


@dataclass(frozen=True)
class Trained:
    """One run that counts, with what its numbers follow from."""

    name: str
    seed: int
    folder: str
    fingerprint: str
    data_hash: str
    revision: str
    steps: Mapping[str, int]
    validation: float | None
    """The last stage's lowest validation loss: its model is the one that was measured."""
    machine: Machine | None = None


@dataclass(frozen=True)
class Rates:
    """What was tried for one joint's learning rates: factor -> validation loss, None where it diverged."""

    losses: Mapping[float, float | None]
    chosen: float
    steps: int
    """Of the last stage in a trial, the shortest one's; that stage's validation losses are compared."""

    @property
    def alike(self) -> bool:
        """Whether no trial differs from another, so that nothing speaks for the chosen one."""
        return len(self.losses) > 1 and len(set(self.losses.values())) == 1

    @property
    def at_edge(self) -> bool:
        """Whether a factor beyond those tried might be better still: the chosen, outermost, has the lowest loss."""
        outermost = len(self.losses) > 1 and self.chosen in (min(self.losses), max(self.losses))
        lowest = min((loss for loss in self.losses.values() if loss is not None), default=None)
        return outermost and not self.alike and self.losses[self.chosen] == lowest


@dataclass(frozen=True)
class Shown:
    """One item that two joints answered differently."""

    label: str
    question: str
    answer: str
    picture: Pillow.Image | None
    said: Mapping[str, str]
    right: str
    """Whose answer was right."""


@dataclass(frozen=True)
class Contrast:
    """Items that one joint had right and the baseline wrong, and the other way round, under the first seed."""

    name: str
    won: int
    lost: int
    items: int
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Drawn:
    """Losses of one stage by joint, the mean over seeds."""

    stage: str
    train: Mapping[str, Points]
    validation: Mapping[str, Points]


@dataclass(frozen=True)
class Outcome:
    """A comparison, finished."""

    title: str
    baseline: str
    names: tuple[str, ...]
    about: Mapping[str, str]
    seeds: tuple[int, ...]
    budget: str
    mean: Line
    """Over the first line of every task that counts right answers."""
    lines: tuple[Line, ...]
    costs: Mapping[str, Cost]
    left_out: Mapping[str, str]
    """Recipes that are in no table, and why."""
    rates: Mapping[str, Rates]
    share: float
    """Of the budget, for each trial of a rate."""
    runs: tuple[Trained, ...]
    settings: tuple[Setting, ...]
    contrasts: tuple[Contrast, ...]
    curves: tuple[Drawn, ...]
    method: Mapping[str, str]
    credits: tuple[Credit, ...]
    operations: float | None = None
    """That each run was to compute, where the budget is in operations."""
    advice: tuple[str, ...] = ()
    """The recommendation, a sentence or two each."""

    @property
    def unmet(self) -> dict[str, float]:
        """What the runs of joints computed that are not within `NEAR` of the operations that were asked for."""
        asked = self.operations
        trained = {} if asked is None else {name: self.costs[name].training for name in self.names}
        return {name: value for name, value in trained.items() if asked and abs(value / asked - 1) > NEAR}

    @property
    def table(self) -> tuple[Line, ...]:
        """The mean and then the tasks that are not the mean itself."""
        return (self.mean, *(line for line in self.lines if not line.same(self.mean)))

    def plain(self) -> dict[str, Any]:
        """All the numbers, for JSON; pictures stay in the page."""
        return {"isthmus_comparison": 1, **as_plain(self)}
