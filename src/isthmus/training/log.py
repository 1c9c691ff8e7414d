"""What a run tells: first lines, progress, one JSON row per step, and a picture of the curves. No account needed."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from isthmus.training.checkpoint import write_text, writing

Row = dict[str, Any]


class Metrics:
    """Rows of `metrics.jsonl`: `{"step": 7, "loss": ...}` per step, `{"step": 7, "validation_loss": ...}` between.

    Args:
        file: appended to.
        after: rows of later steps are dropped, because the run goes on from this step.
    """

    def __init__(self, file: Path, after: int):
        self.file = file
        rows = [row for row in read_rows(file) if row["step"] <= after]
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, row: Row) -> None:
        with writing(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def read_rows(file: Path) -> list[Row]:
    """All whole rows of a metrics file; a last row cut off by a crash is left out."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Progress:
    """A bar with time left on a terminal; a plain line for every twentieth of the way elsewhere."""

    def __init__(self, console: Console, title: str, steps: int, done: int):
        self.console, self.title, self.steps = console, title, steps
        self.every = max(1, math.ceil(steps / 20))
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

    def say(self, what: RenderableType) -> None:
        self.console.print(what, soft_wrap=isinstance(what, str), highlight=False, markup=False)


@contextlib.contextmanager
def counting(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (done, total); nothing is shown before the first report."""
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: list[TaskID] = []

    def report(done: int, total: int) -> None:
        if not tasks:
            tasks.append(bar.add_task(title, total=total))
            if not console.is_terminal:
                console.print(f"{title}: {total}", highlight=False)
        bar.update(tasks[0], completed=done)

    with bar:
        yield report


def first_lines(title: str, table: RenderableType, sample: RenderableType | None) -> RenderableType:
    """How a run begins: what trains, how much of it, and one sample as the model reads it, trained tokens marked."""
    lines: list[RenderableType] = [Text(title), table]
    if sample is not None:
        lines += [Text("One sample as it is read; what is trained is marked:"), sample]
    return Group(*lines)


# ---------------------------------------------------------------------------------------------- the picture

SIZE, SCALE = (960, 540), 2
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 48, 56
INK, GRID, PALE, LINE, DOT = "#333333", "#e6e6e6", "#c5d7ea", "#1f5fa8", "#d1495b"


def draw_curves(rows: Sequence[Row], file: Path, title: str) -> None:
    """A PNG of the training loss (raw and smoothed) and the validation losses (dots); nothing without rows."""
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if not train:
        return
    plot = _Plot(train, [*_smooth(train), *validation])
    plot.axes(title)
    plot.line(train, PALE, 1)
    plot.line(_smooth(train), LINE, 2)
    plot.dots(validation, DOT)
    plot.legend([("training loss", LINE)] + [("validation loss", DOT)] * bool(validation))
    with writing(file):
        plot.image.resize(SIZE, Image.Resampling.LANCZOS).save(file)


class _Plot:
    """Axes on a canvas that is drawn twice as large, so that shrinking it smooths the lines."""

    def __init__(self, xs: Sequence[tuple[int, float]], ys: Sequence[tuple[int, float]]):
        self.image = Image.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(13 * SCALE)
        self.xs = _ticks(0, max(x for x, _ in xs))
        self.ys = _ticks(min(y for _, y in ys), max(y for _, y in ys))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; what lies beyond the axes is moved to their edge."""
        across = (x - self.xs[0]) / (self.xs[-1] - self.xs[0])
        up = min(1.0, max(0.0, (y - self.ys[0]) / (self.ys[-1] - self.ys[0])))
        width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return (LEFT + across * width) * SCALE, (TOP + (1 - up) * height) * SCALE

    def text(self, at: tuple[float, float], text: str, anchor: str) -> None:
        self.draw.text(at, text, fill=INK, font=self.font, anchor=anchor)

    def axes(self, title: str) -> None:
        for y in self.ys:
            self.draw.line([self.at(self.xs[0], y), self.at(self.xs[-1], y)], fill=GRID, width=SCALE)
            left, middle = self.at(self.xs[0], y)
            self.text((left - 8 * SCALE, middle), f"{y:g}", "rm")
        for x in self.xs:
            middle, bottom = self.at(x, self.ys[0])
            self.draw.line([(middle, bottom), (middle, bottom + 4 * SCALE)], fill=INK, width=SCALE)
            self.text((middle, bottom + 8 * SCALE), f"{x:g}", "ma")
        self.draw.line([self.at(self.xs[0], self.ys[0]), self.at(self.xs[-1], self.ys[0])], fill=INK, width=SCALE)
        self.text((LEFT * SCALE, 16 * SCALE), title, "la")
        self.text((SIZE[0] / 2 * SCALE, (SIZE[1] - 10) * SCALE), "optimizer steps", "ms")

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
        places = [self.at(*point) for point in points]
        if len(places) > 1:
            self.draw.line(places, fill=colour, width=width * SCALE, joint="curve")
        else:
            self.dots(points, colour)

    def dots(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        for point in points:
            self.draw.circle(self.at(*point), 4 * SCALE, fill=colour)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        right = float((SIZE[0] - RIGHT) * SCALE)
        for name, colour in reversed(entries):
            self.text((right, 16 * SCALE), name, "ra")
            right -= self.draw.textlength(name, font=self.font) + 12 * SCALE
            self.draw.circle((right, 24 * SCALE), 4 * SCALE, fill=colour)
            right -= 20 * SCALE


def _smooth(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean over a fiftieth of the points."""
    span = max(1, len(points) // 50)
    windows = (points[max(0, end - span) : end] for end in range(1, len(points) + 1))
    return [(window[-1][0], sum(y for _, y in window) / len(window)) for window in windows]


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers that enclose the range."""
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 5))
    width = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 6)
    first, last = math.floor(low / width), math.ceil(high / width)
    return [round(number * width, 10) for number in range(first, max(last, first + 1) + 1)]
