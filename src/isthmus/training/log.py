"""What a run tells: first lines, progress, and one JSON row per step (TensorBoard if asked). No account needed."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from isthmus.files import write_text, writing
from isthmus.training.board import Board

Row = dict[str, Any]
PATIENT, LOOKED = 0.1, 20
"""Share of the time that may go by waiting for data unsaid, and the steps after which that is judged."""


class Metrics:
    """Rows of `metrics.jsonl`: `{"step": 7, "loss": ...}` per step, `{"step": 7, "validation_loss": ...}` between.

    Args:
        file: appended to.
        after: rows of later steps are dropped, because the run goes on from this step.
        writes: False in processes that leave the writing to another.
        tensorboard: write TensorBoard events too, into `tensorboard/` beside the file.
    """

    def __init__(self, file: Path, after: int, writes: bool = True, tensorboard: bool = False):
        self.file, self.writes = file, writes
        self.board: Board | None = None
        if not writes:
            return
        rows = [row for row in read_rows(file) if row["step"] <= after]
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
            if tensorboard:
                self.board = Board(file.parent / "tensorboard", rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.board is not None:
            self.board.close()

    def write(self, row: Row) -> None:
        """Add a row with the time of day, in seconds since 1970."""
        if not self.writes:
            return
        row = {**row, "time": round(time.time(), 3)}
        with writing(self.file):
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            if self.board is not None:
                self.board.write(row)


def read_rows(file: Path) -> list[Row]:
    """All whole rows of a metrics file; what a crash cut off, or a disk damaged, is left out."""
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [row for line in lines if (row := _row(line))]


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class Progress:
    """A bar with time left on a terminal; a plain line for every twentieth of the way elsewhere."""

    def __init__(self, console: Console, title: str, steps: int, done: int):
        self.console, self.title, self.steps = console, title, steps
        self.every = max(1, math.ceil(steps / 20))
        self.shown, self.seconds, self.waited = 0, 0.0, 0.0
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(title, total=steps, completed=done, news="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def show(self, row: Row) -> None:
        """One more step is done."""
        news = (
            f"loss {row['loss']:.4f} · {row['tokens_per_second']:,.0f} tokens/s · "
            f"waiting for data {row['data_wait']:.0%}"
        )
        self.bar.update(self.task, completed=row["step"], news=news)
        if not self.console.is_terminal and (row["step"] % self.every == 0 or row["step"] == self.steps):
            self.say(f"{self.title} {row['step']}/{self.steps} · {news}")
        self._judge(row)

    def _judge(self, row: Row) -> None:
        """Say once if the data keep the training waiting; the first step, in which workers start, does not count."""
        self.shown += 1
        if self.shown == 1:
            return
        self.seconds += row["seconds"]
        self.waited += row["data_wait"] * row["seconds"]
        if self.shown == 1 + LOOKED and self.waited > PATIENT * self.seconds:
            self.say(
                f"waiting for data takes {self.waited / self.seconds:.0%} of the time: "
                "more engine.workers prepare more batches ahead"
            )

    def say(self, what: RenderableType) -> None:
        self.console.print(what, soft_wrap=isinstance(what, str), highlight=False, markup=False)


@contextlib.contextmanager
def counting(console: Console, title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for work that reports (done, total known so far, or None); nothing is shown before the first report."""
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: list[TaskID] = []

    def report(done: int, total: int | None) -> None:
        if not tasks:
            tasks.append(bar.add_task(title, total=total))
            if not console.is_terminal:
                console.print(f"{title}: {total}", highlight=False)
        bar.update(tasks[0], completed=done, total=total)

    with bar:
        yield report


def first_lines(title: str, table: RenderableType, sample: RenderableType | None) -> RenderableType:
    """How a run begins: what trains, how much of it, and one sample as the model reads it, trained tokens marked."""
    lines: list[RenderableType] = [Text(title), table]
    if sample is not None:
        lines += [Text("One sample as it is read; what is trained is marked:"), sample]
    return Group(*lines)
