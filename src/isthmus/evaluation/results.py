"""What a report says, as plain values: parts, result rows with intervals, curves, examples, credits.

Rows are made from predictions by `rows`; `Report.plain` is what `report.json` holds.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image as Pillow

from isthmus.data.media import open_image
from isthmus.evaluation import statistics
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.draw import drawn
from isthmus.evaluation.statistics import Estimate, short
from isthmus.evaluation.tasks import Cut, Task
from isthmus.types import DataError

Column: TypeAlias = Literal["before", "after", "blind", "shuffled", "cosine"]
COLUMNS: tuple[Column, ...] = ("before", "after", "blind", "shuffled", "cosine")
Runs: TypeAlias = Mapping[Column, Sequence[Prediction]]
"""A task's predictions in the order of its items, under every condition that was measured; `after` has all of them."""


def file_of(folder: Path, task: str, column: Column) -> Path:
    """Where a folder of predictions has those of a task in one column; controls are of the model after training."""
    if column == "before":
        return folder / "before" / f"{task}.jsonl"
    return folder / "after" / (f"{task}.jsonl" if column == "after" else f"{task}.{column}.jsonl")


@dataclass(frozen=True)
class Part:
    """One part of the model; `trained` of its `parameters` were trained."""

    role: Literal["encoder", "joint", "llm", "adapter"]
    name: str
    source: str
    parameters: int
    trained: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the result table. `gains` are paired differences of `after` from the other columns."""

    task: str
    label: str
    unit: str
    n: int
    clusters: int
    cells: Mapping[Column, Estimate]
    gains: Mapping[Column, Estimate] = field(default_factory=dict)
    kinds: Mapping[str, Estimate] = field(default_factory=dict)
    """After training, within each kind of question, where there are several; `macro` is their mean."""
    macro: Estimate | None = None
    chance: float | None = None
    besides: Mapping[str, Mapping[Column, Estimate | None]] = field(default_factory=dict)
    """Further figures by name, in the columns that were asked all items; None while an item is not scored."""

    @property
    def fewest(self) -> int:
        """Items of the column that was asked fewest of them (`TaskConfig.baseline_limit`)."""
        return min((cell.n for cell in self.cells.values()), default=self.n)


@dataclass(frozen=True)
class Curve:
    """Losses of one stage, as (step, loss)."""

    stage: str
    train: tuple[tuple[float, float], ...]
    validation: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Example:
    """One item with its picture, as answered before and after training."""

    label: str
    question: str
    picture: Pillow.Image
    after: Prediction
    before: Prediction | None = None


@dataclass(frozen=True)
class Generation:
    """What the model says in its own words, shown as it comes."""

    prompt: str
    reply: str
    picture: Pillow.Image | None = None
    reference: str = ""


@dataclass(frozen=True)
class Credit:
    """Whose work was used, and under which licence."""

    name: str
    used_as: str
    licence: str
    author: str = ""
    address: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a report says.

    Attributes:
        sentence: the result in one sentence.
        method: how it was measured, label -> text, in the order of the page: rule, machine, dtype, package versions.
        seconds: how long each leg took.
        draw: how examples were chosen, in one sentence.
    """

    title: str
    sentence: str
    parts: tuple[Part, ...]
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    fingerprint: str
    data_hash: str
    seed: int
    revision: str
    method: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    examples: tuple[Example, ...] = ()
    generations: tuple[Generation, ...] = ()
    credits: tuple[Credit, ...] = ()
    draw: str = "Drawn by the seed, the same number from each task, whether right or wrong."

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)

    def plain(self) -> dict[str, Any]:
        """All the numbers, for JSON; pictures stay in the page."""
        return {"isthmus_report": 1, "parameters": self.parameters, "trained": self.trained, **as_plain(self)}


# ---------------------------------------------------------------------------------------------- numbers


def rows(task: Task, runs: Runs, seed: int = 0) -> tuple[Row, ...]:
    """The rows that a task fills, one per cut that has items."""
    return tuple(_row(task, cut, runs, seed) for cut in task.cuts if any(cut.takes(item.kind) for item in task.items))


def _row(task: Task, cut: Cut, runs: Runs, seed: int) -> Row:
    chosen = {
        column: told
        for column in COLUMNS
        if (told := [prediction for prediction in runs.get(column, ()) if cut.takes(prediction.kind)])
    }
    cells = {column: estimate(predictions, task.unit, seed) for column, predictions in chosen.items()}
    sample = max(chosen.values(), key=len)
    row = Row(task.name, cut.label, task.unit, len(sample), len({p.cluster for p in sample}), cells)
    if "after" not in chosen:
        return row
    after = chosen["after"]
    besides = _besides(task, chosen, cells) if cut.kinds is None else {}
    pairs = {
        column: [pair for pair in zip(alike(runs["after"], runs[column]), runs[column]) if cut.takes(pair[1].kind)]
        for column in chosen
        if column != "after"
    }
    if task.unit != "accuracy":
        change: dict[Column, Estimate] = {"before": _change(pairs["before"], seed)} if "before" in pairs else {}
        return replace(row, gains=change, besides=besides)
    right, clusters, kinds = [p.right for p in after], [p.cluster for p in after], [p.kind for p in after]
    several = len(set(kinds)) > 1
    sizes = [len(item.choices) for item in task.items if cut.takes(item.kind)]
    return replace(
        row,
        gains={column: _gain(both, seed) for column, both in pairs.items()},
        kinds=statistics.by_kind(right, kinds, clusters, seed=seed) if several else {},
        macro=statistics.macro(right, kinds, clusters, seed=seed) if several else None,
        chance=sum(1 / size for size in sizes) / len(sizes) if all(sizes) else None,
        besides=besides,
    )


def alike(after: Sequence[Prediction], other: Sequence[Prediction]) -> Sequence[Prediction]:
    """Those of `after` whose items another condition was asked, too, in its order.

    Raises:
        DataError: they are other items.
    """
    found = after if len(after) <= len(other) else [after[place] for place in drawn(len(after), len(other))]
    if [one.id for one in found] != [one.id for one in other]:
        raise DataError("the items before and after training differ", "measure both again")
    return found


def _gain(pairs: Sequence[tuple[Prediction, Prediction]], seed: int) -> Estimate:
    """By how much more of the items were right after training."""
    clusters = [after.cluster for after, _ in pairs]
    return statistics.difference([a.right for a, _ in pairs], [b.right for _, b in pairs], clusters, seed=seed)


def _change(pairs: Sequence[tuple[Prediction, Prediction]], seed: int) -> Estimate:
    """By how much NLL per token has changed from before to after, paired by item.

    Raises:
        DataError: an item has other tokens than before.
    """
    if any(after.tokens != before.tokens for after, before in pairs):
        raise DataError("the items have not the same tokens as before", "compare models with one tokenizer")
    differences = [before.scores[-1] - after.scores[-1] for after, before in pairs]
    clusters, tokens = [after.cluster for after, _ in pairs], [after.tokens for after, _ in pairs]
    return statistics.mean(differences, clusters, tokens, seed=seed)


def _besides(task: Task, chosen: Runs, cells: Mapping[Column, Estimate]) -> dict[str, dict[Column, Estimate | None]]:
    """The task's further figures; without their values while an item is not scored: they count it as wrong."""
    found: defaultdict[str, dict[Column, Estimate | None]] = defaultdict(dict)
    for column, told in chosen.items():
        if len(told) == len(chosen["after"]):
            for name, value in task.totals(told).items():
                found[name][column] = None if cells[column].unscored else value
    return dict(found)


def estimate(predictions: Sequence[Prediction], unit: str = "accuracy", seed: int = 0) -> Estimate:
    """Accuracy, or NLL per token, with its interval clustered as the predictions say."""
    clusters = [prediction.cluster for prediction in predictions]
    if unit == "accuracy":
        return statistics.accuracy([prediction.right for prediction in predictions], clusters, seed=seed)
    totals = [-prediction.scores[-1] for prediction in predictions]
    return statistics.mean(totals, clusters, [prediction.tokens for prediction in predictions], seed=seed)


def examples(runs: Mapping[str, tuple[Task, Runs]], count: int = 10, seed: int = 0) -> tuple[Example, ...]:
    """`count` items with their pictures, from tasks by label with their predictions before and after training.

    Raises:
        DataError: a picture cannot be read.
    """
    found = []
    for label, place in draw_examples(runs, count, seed):
        task, columns = runs[label]
        item = task.items[place]
        prompt = item.prompt
        image = prompt.pictures[-1]  # demonstrations come first
        after, asked = columns["after"][place], columns.get("before", ())
        before = next((old for new, old in zip(alike(columns["after"], asked), asked) if new is after), None)
        found.append(Example(label, item.words, open_image(image.source, prompt.id), after, before))
    return tuple(found)


def draw_examples(runs: Mapping[str, tuple[Task, Runs]], count: int = 10, seed: int = 0) -> list[tuple[str, int]]:
    """(label of the runs, item's place), `count` in all, drawn by the seed alike from every task.

    What has no choices or no picture is left out, and so is what was asked after training alone while others were
    asked before it: it cannot be shown as an example.
    """
    dice = random.Random(seed)
    asked = {
        label: {*drawn(len(task.items), len(columns["before"]))} if "before" in columns else set(range(len(task.items)))
        for label, (task, columns) in runs.items()
    }
    fit = {
        label: [
            place
            for place, item in enumerate(task.items)
            if item.choices and item.prompt.pictures and place in asked[label]
        ]
        for label, (task, _) in runs.items()
    }
    places = {label: dice.sample(found, len(found)) for label, found in fit.items() if found}
    turns = [(label, places[label][turn]) for turn in range(count) for label in places if turn < len(places[label])]
    return sorted(turns[:count], key=lambda found: list(places).index(found[0]))


# ---------------------------------------------------------------------------------------------- words


def headline(value: Estimate) -> str:
    """The number, or the range where some items were not scored."""
    if value.unscored:
        return f"{short(value.lowest)}–{short(value.highest)}"
    return short(value.value)


def interval(value: Estimate) -> str:
    """The interval, with two decimals."""
    return f"{short(value.low, 2)}–{short(value.high, 2)}"


def as_plain(value: Any) -> Any:
    """Dataclasses to plain values; a picture becomes its size, a number that is none becomes null."""
    if isinstance(value, Pillow.Image):
        return {"width": value.width, "height": value.height}
    if isinstance(value, Estimate | Prediction):
        return as_plain(asdict(value))
    if is_dataclass(value):
        return {name: as_plain(content) for name, content in vars(value).items()}
    if isinstance(value, Mapping):
        return {str(name): as_plain(content) for name, content in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(content) for content in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
