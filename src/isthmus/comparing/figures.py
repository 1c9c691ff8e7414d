"""The figures of a comparison's page as inline SVG: intervals side by side, quality over cost, losses over steps.

Joints differ in colour and in shape, so that neither is needed alone; colours are classes of the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isthmus.comparing.outcome import Drawn, Line, Points
from isthmus.evaluation.drawing import nice_ticks, number_short, running_mean
from isthmus.evaluation.escaping import escape
from isthmus.evaluation.statistics import short

COLOURS = 8
PLUS = (-0.4, -1.3), (0.4, -1.3), (0.4, -0.4), (1.3, -0.4), (1.3, 0.4), (0.4, 0.4)
SHAPES: tuple[tuple[tuple[float, float], ...], ...] = (
    (),  # a circle
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    ((0, -1.2), (1.2, 1), (-1.2, 1)),
    ((0, 1.2), (1.2, -1), (-1.2, -1)),
    (*PLUS, *((-x, -y) for x, y in PLUS)),
    tuple((0.75 * (x - y), 0.75 * (x + y)) for x, y in (*PLUS, *((-x, -y) for x, y in PLUS))),
    ((-1.1, -1.2), (1.1, -1.2), (-1.1, 1.2), (1.1, 1.2)),
)
"""Corners, in units of a sign's size: as many as colours, so that eight joints differ in both."""


def sign(number: int, x: float, y: float, size: float = 5.5) -> str:
    """The mark of the joint with this number; from the ninth on, colours come again with other shapes."""
    corners = SHAPES[(number + number // COLOURS) % len(SHAPES)]
    points = " ".join(f"{x + size * across:.1f},{y + size * down:.1f}" for across, down in corners)
    shape = f'points="{points}"' if corners else f'cx="{x:.1f}" cy="{y:.1f}" r="{size}"'
    return f'<g class="s{number % COLOURS}"><{"polygon" if corners else "circle"} class="sign" {shape}/></g>'


def key(number: int) -> str:
    """The mark beside a name in a table."""
    return f'<svg class="key" viewBox="0 0 14 14" aria-hidden="true">{sign(number, 7, 7, 4.5)}</svg>'


def legend(names: Sequence[str]) -> str:
    """The marks and whose they are."""
    entries = "".join(f"<li>{key(number)}{escape(name)}</li>" for number, name in enumerate(names))
    return f'<ul class="legend">{entries}</ul>'


# ---------------------------------------------------------------------------------------------- side by side

_ROW, _NAMES, _ACROSS = 38, 170, 700


def forest(line: Line, names: Sequence[str], baseline: str) -> str:
    """Every joint on one line of the table: its mean, the interval over seeds (thin) and over items (thick)."""
    ticks = _ends([value for name in names for value in _values(line, name)], line.unit == "accuracy")
    low, high = ticks[0], ticks[-1]
    height = _ROW * len(names) + 34

    def place(value: float) -> float:
        return _NAMES + (_ACROSS - _NAMES - 60) * (min(max(value, low), high) - low) / (high - low)

    foot = height - 24
    drawn = [_upright(place(tick), 4, foot, number_short(round(tick, 6)), "grid") for tick in ticks]
    drawn.append(_upright(place(line.cells[baseline].level.value), 4, foot, "", "base"))
    for number, name in enumerate(names):
        level, y = line.cells[name].level, _ROW * number + _ROW / 2 + 2
        drawn.append(f'<text class="name" x="{_NAMES - 16}" y="{y + 5}" text-anchor="end">{escape(name)}</text>')
        drawn.append(_bar(number, place(level.items_low), place(level.items_high), y, "reach items"))
        if level.low is not None and level.high is not None:
            drawn.append(_bar(number, place(level.low), place(level.high), y, "reach"))
        drawn.append(sign(number, place(level.value), y))
        drawn.append(f'<text x="{_ACROSS - 44}" y="{y + 4}">{short(level.value)}</text>')
    words = ", ".join(f"{name} {short(line.cells[name].level.value)}" for name in names)
    return (
        f'<svg class="forest" viewBox="0 0 {_ACROSS} {height}" role="img" '
        f'aria-label="{escape(line.label)}: {escape(words)}">{"".join(drawn)}</svg>'
    )


def _values(line: Line, name: str) -> list[float]:
    level = line.cells[name].level
    return [level.value, level.items_low, level.items_high]


def _ends(values: Sequence[float], shares: bool) -> list[float]:
    """Ticks around the values; an interval over two seeds may reach far beyond, and is cut at the frame."""
    low, high = min(values), max(values)
    margin = 0.25 * (high - low) or 0.05
    low, high = low - margin, high + margin
    if shares:
        low, high = max(0.0, low), min(1.0, high)
    return nice_ticks(low, high)


def _upright(x: float, top: float, foot: float, text: str, kind: str) -> str:
    line = f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{foot}"/>'
    return line + (f'<text class="tick" x="{x:.1f}" y="{foot + 15}" text-anchor="middle">{text}</text>' if text else "")


def _bar(number: int, start: float, end: float, y: float, kind: str) -> str:
    return (
        f'<g class="s{number % COLOURS}"><line class="{kind}" x1="{start:.1f}" x2="{end:.1f}" '
        f'y1="{y:.1f}" y2="{y:.1f}"/></g>'
    )


# ---------------------------------------------------------------------------------------------- quality over cost


@dataclass(frozen=True)
class Frame:
    """Axes of a small plot, in pixels; `across` may be logarithmic."""

    xs: Sequence[float]
    ys: Sequence[float]
    log: bool = False
    width: int = 380
    height: int = 240

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; what lies beyond the axes is moved to their edge."""
        scale = math.log10 if self.log else float
        low, high = scale(self.xs[0]), scale(self.xs[-1])
        across = (scale(min(max(x, self.xs[0]), self.xs[-1])) - low) / (high - low)
        up = (min(max(y, self.ys[0]), self.ys[-1]) - self.ys[0]) / (self.ys[-1] - self.ys[0])
        return 44 + across * (self.width - 60), self.height - 40 - up * (self.height - 54)

    def axes(self, below: str) -> str:
        lines = []
        for tick in self.ys:
            x, y = self.at(self.xs[0], tick)
            lines.append(f'<line class="grid" x1="44" x2="{self.width - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
            text = number_short(round(tick, 6))
            lines.append(f'<text class="tick" x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        for tick in self.xs:
            x, y = self.at(tick, self.ys[0])
            lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{y + 4:.1f}"/>')
            text, side = number_short(tick), "end" if tick == self.xs[-1] else "middle"
            lines.append(f'<text class="tick" x="{x:.1f}" y="{y + 16:.1f}" text-anchor="{side}">{text}</text>')
        middle = 44 + (self.width - 60) / 2
        lines.append(
            f'<text class="tick" x="{middle}" y="{self.height - 6}" text-anchor="middle">{escape(below)}</text>'
        )
        return "".join(lines)


def front(line: Line, names: Sequence[str], costs: Mapping[str, float], unit: str, title: str) -> str:
    """Quality over one cost, with the joints that nothing cheaper is better than joined by a line."""
    level = {name: line.cells[name].level for name in names}
    frame = Frame(
        _across(list(costs.values())),
        _ends([value for name in names for value in _values(line, name)], line.unit == "accuracy"),
        log=_spread(list(costs.values())),
    )
    edge = [frame.at(costs[name], level[name].value) for name in best(line, names, costs)]
    drawn = [frame.axes(unit), f'<polyline class="edge" points="{_points(edge)}"/>']
    for number, name in enumerate(names):
        x, y = frame.at(costs[name], level[name].value)
        top, foot = (frame.at(costs[name], end)[1] for end in (level[name].items_high, level[name].items_low))
        drawn.append(
            f'<g class="s{number % COLOURS}"><line class="reach" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" '
            f'y2="{foot:.1f}"/></g>{sign(number, x, y)}'
        )
    words = ", ".join(f"{name} {short(level[name].value)} at {costs[name]:.3g}" for name in names)
    return (
        f'<svg class="front" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{escape(f"{line.label} over {title}, {unit}: {words}")}">{"".join(drawn)}</svg>'
    )


def best(line: Line, names: Sequence[str], costs: Mapping[str, float]) -> list[str]:
    """The Pareto front, cheapest first: joints that none with at most their cost is better than."""
    factor = 1 if line.higher else -1
    quality = {name: factor * line.cells[name].level.value for name in names}
    found: list[str] = []
    for name in sorted(names, key=lambda name: (costs[name], -quality[name])):
        if not found or quality[name] > quality[found[-1]]:
            found.append(name)
    return found


def _spread(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 8


def _across(values: Sequence[float]) -> list[float]:
    """Ticks along a cost: powers of ten where it spreads, else round numbers from 0."""
    if _spread(values):
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return [10.0**power for power in range(low, high + 1)]
    return nice_ticks(0, max(values) or 1.0)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


# ---------------------------------------------------------------------------------------------- losses


def losses(drawn: Drawn, names: Sequence[str]) -> str:
    """Training losses of one stage, smoothed, by joint; validation losses dashed."""
    smooth = {name: running_mean(points) for name, points in drawn.train.items()}
    every = [point for points in (*smooth.values(), *drawn.validation.values()) for point in points]
    frame = Frame(
        nice_ticks(0, max(x for x, _ in every)), nice_ticks(min(y for _, y in every), max(y for _, y in every))
    )
    shapes = [frame.axes("optimizer steps")]
    for name, points in smooth.items():
        shapes.append(_curve(names.index(name), points, frame, "train"))
    shapes += [_curve(names.index(name), points, frame, "validation") for name, points in drawn.validation.items()]
    words = ", ".join(f"{name} {points[0][1]:.2f} to {points[-1][1]:.2f}" for name, points in smooth.items())
    return (
        f'<svg class="losses" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="training loss of stage {escape(drawn.stage)}: {escape(words)}">{"".join(shapes)}</svg>'
    )


def _curve(number: int, points: Sequence[tuple[float, float]] | Points, frame: Frame, kind: str) -> str:
    places = [frame.at(*point) for point in points]
    end = sign(number, *places[-1], 3.5)
    return f'<g class="s{number % COLOURS}"><polyline class="{kind}" points="{_points(places)}"/></g>{end}'
