"""A picture of a run's losses, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from isthmus.files import writing

Row: TypeAlias = Mapping[str, Any]
Point: TypeAlias = tuple[int, float]

SIZE, SCALE = (960, 540), 2
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 48, 56
INK, GRID, PALE, LINE, DOT = "#333333", "#e6e6e6", "#c5d7ea", "#1f5fa8", "#d1495b"
COLOURS = ("#1f5fa8", "#d1495b", "#2a9d4f", "#8e5bb5", "#c98a1b", "#2a9ba6", "#8c564b", "#6b7280")


def draw_curves(rows: Sequence[Row], file: Path, title: str) -> None:
    """A PNG of the training loss (raw and smoothed) and the validation losses (dots); nothing without rows."""
    train, validation = _losses(rows)
    if not train:
        return
    plot = _Plot(train, [*_smooth(train), *validation])
    plot.axes(title)
    plot.line(train, PALE, 1)
    plot.line(_smooth(train), LINE, 2)
    plot.dots(validation, DOT)
    plot.legend([("training loss", LINE)] + [("validation loss", DOT)] * bool(validation))
    plot.save(file)


def draw_together(curves: Mapping[str, Sequence[Row]], file: Path) -> bool:
    """A PNG of the smoothed losses of several stages by name, validation as dots; whether there was anything to draw.

    More curves than colours go round the colours again.
    """
    losses = {name: _losses(rows) for name, rows in curves.items()}
    losses = {name: found for name, found in losses.items() if found[0]}
    if not losses:
        return False
    shown = [(_smooth(train), validation) for train, validation in losses.values()]
    everything = [point for train, validation in shown for point in (*train, *validation)]
    plot = _Plot(everything, everything)
    plot.axes("Training loss; dots are validation")
    for colour, (train, validation) in zip(cycle(COLOURS), shown):
        plot.line(train, colour, 2)
        plot.dots(validation, colour)
    plot.key(list(zip(losses, cycle(COLOURS))))
    plot.save(file)
    return True


def _losses(rows: Sequence[Row]) -> tuple[list[Point], list[Point]]:
    """(step, loss) of training and of validation."""
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    return train, [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]


class _Plot:
    """Axes on a canvas that is drawn twice as large, so that shrinking it smooths the lines."""

    def __init__(self, xs: Sequence[Point], ys: Sequence[Point]):
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

    def key(self, entries: Sequence[tuple[str, str]]) -> None:
        """Names under each other inside the axes, where a falling curve leaves room."""
        for number, (name, colour) in enumerate(entries):
            right, middle = (SIZE[0] - RIGHT - 8) * SCALE, (TOP + 12 + 18 * number) * SCALE
            self.text((right, middle), name, "rm")
            self.draw.circle(
                (right - self.draw.textlength(name, font=self.font) - 10 * SCALE, middle), 4 * SCALE, colour
            )

    def save(self, file: Path) -> None:
        with writing(file):
            self.image.resize(SIZE, Image.Resampling.LANCZOS).save(file)


def _smooth(points: Sequence[Point]) -> list[Point]:
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
