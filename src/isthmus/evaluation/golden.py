"""Golden predictions: what is answered now beside what was kept of an earlier evaluation, item by item.

After an upgrade, on another machine or after a change of code the same model is to give the same answers. Kept are the
folders that `isthmus eval --out` writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from isthmus.evaluation import answers
from isthmus.evaluation.answers import Prediction
from isthmus.evaluation.measure import Measured
from isthmus.evaluation.results import COLUMNS, Column, file_of
from isthmus.evaluation.tasks import Task
from isthmus.types import DataError


@dataclass(frozen=True)
class Changes:
    """How one task's predictions under one condition differ from those that were kept."""

    task: str
    column: Column
    items: int
    others: tuple[str, ...]
    """Ids that are asked on one side alone, or in other words."""
    changed: tuple[str, ...]
    """Ids whose answer is another one, or right to another degree, of those that are asked alike."""
    lost: int
    """Items that were right and are not."""
    won: int
    """Items that were not right and are."""
    apart: float
    """The largest difference of a score."""

    @property
    def differing(self) -> int:
        """Items that are asked otherwise, or answered otherwise."""
        return len(self.others) + len(self.changed)


def compare(measured: Measured, folder: Path) -> list[Changes]:
    """All that was measured beside the predictions kept in a folder of `isthmus eval`.

    Raises:
        DataError: the folder has no such predictions, or they were scored by another rule.
    """
    return [
        _changes(task, column, runs[column], folder)
        for task, runs in measured.values()
        for column in COLUMNS
        if column in runs
    ]


def _changes(task: Task, column: Column, now: Sequence[Prediction], folder: Path) -> Changes:
    path = file_of(folder, task.name, column)
    header, golden = answers.read(path)
    if column != "cosine" and (header.rule, header.scoring) != (task.rule, answers.SCORING):
        raise DataError(f"{path}: its answers were scored by another rule", "keep predictions of this version")
    before, after = _numbered(golden), _numbered(now)
    pairs = {key: (before[key], after[key]) for key in after if key in before}
    same = {key for key, (old, new) in pairs.items() if (old.prompt, old.choices) == (new.prompt, new.choices)}
    alike = [pair for key, pair in pairs.items() if key in same]
    scores = [(x, y) for old, new in alike for x, y in zip(old.scores, new.scores)]
    return Changes(
        task=task.name,
        column=column,
        items=len(now),
        others=tuple(key[0] for key in {**before, **after} if key not in same),
        changed=tuple(old.id for old, new in alike if (old.prediction, old.right) != (new.prediction, new.right)),
        lost=sum((old.right or 0) > (new.right or 0) for old, new in alike),
        won=sum((old.right or 0) < (new.right or 0) for old, new in alike),
        apart=max((abs(x - y) for x, y in scores), default=0.0),
    )


def _numbered(predictions: Sequence[Prediction]) -> dict[tuple[str, int], Prediction]:
    """Each by its id and how many stand before it that have the same: ids of joined files start again."""
    seen = Counter[str]()
    found: dict[tuple[str, int], Prediction] = {}
    for one in predictions:
        found[one.id, seen[one.id]] = one
        seen[one.id] += 1
    return found


def table(found: Sequence[Changes]) -> Table:
    """For the terminal; the first ids of what differs stand below their task."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    result.add_column("beside what was kept")
    for name in ("items", "asked otherwise", "answers changed", "lost", "won", "scores apart"):
        result.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for one in found:
        named = ", ".join((*one.changed, *one.others)[:3])
        what = f"{one.task} {one.column}" + (f"\n{named}" if named else "")
        numbers = one.items, len(one.others), len(one.changed), one.lost, one.won
        result.add_row(what, *map(str, numbers), f"{one.apart:.2g}")
    return result
