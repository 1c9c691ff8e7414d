"""The figures of a report as inline SVG: the joint, interval marks, loss curves; and pictures as data URLs.

Colours are classes of the page's style sheet, so that figures follow light and dark.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from io import BytesIO

from PIL import Image as Pillow

from isthmus.evaluation.escaping import escape
from isthmus.evaluation.results import COLUMNS, Column, Curve, Part, Row

Point = tuple[float, float]

LAND = (
    "M0,16 C110,8 210,10 282,30 C336,45 356,66 392,67 L468,67 C504,66 524,45 578,30 C650,10 750,8 860,16 "
    "L860,134 C750,142 650,140 578,120 C524,105 504,84 468,83 L392,83 C356,84 336,105 282,120 C210,140 110,142 0,134 Z"
)
"""Two continents and the narrow land between them, 860 × 150."""


def isthmus(parts: Sequence[Part]) -> str:
    """Encoder, joint and LLM as a map; what trained is coloured."""
    encoder, joint, llm = (_total(parts, roles) for roles in (("encoder",), ("joint",), ("llm", "adapter")))
    regions = [(0, 376, encoder), (376, 108, joint), (484, 376, llm)]
    fills = "".join(
        f'<rect class="{"trained" if trained == parameters else "part-trained" if trained else "frozen"}" '
        f'x="{x}" y="0" width="{width}" height="150"/>'
        for x, width, (parameters, trained) in regions
    )
    words = f"encoder {count(encoder[0])}, joint {count(joint[0])}, language model {count(llm[0])}"
    return (
        f'<svg class="map" viewBox="0 0 860 150" role="img" aria-label="{words}">'
        f'<defs><clipPath id="land"><path d="{LAND}"/></clipPath></defs>'
        f'<g clip-path="url(#land)">{fills}</g>'
        + _label(150, 70, "encoder", encoder)
        + _label(430, 42, "joint", (joint[0], joint[1]), below=62)
        + _label(710, 70, "language model", llm)
        + "</svg>"
    )


def _total(parts: Sequence[Part], roles: Sequence[str]) -> tuple[int, int]:
    chosen = [part for part in parts if part.role in roles]
    return sum(part.parameters for part in chosen), sum(part.trained for part in chosen)


def _label(x: int, y: int, name: str, size: tuple[int, int], below: int = 22) -> str:
    parameters, trained = size
    state = "all trained" if trained == parameters else f"{count(trained)} trained" if trained else "frozen"
    return (
        f'<text class="name" x="{x}" y="{y}" text-anchor="middle">{name}</text>'
        f'<text class="size" x="{x}" y="{y + below}" text-anchor="middle">{count(parameters)} · {state}</text>'
    )


def count(value: int) -> str:
    """134515008 -> 134.5 M"""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.{3 if value < 100 * size else 4}g} {unit}"
    return str(value)


# ---------------------------------------------------------------------------------------------- interval marks

_WIDTH, _HEIGHT, _MIDDLE, _EDGE = 200, 40, 20, 8


def marks(row: Row) -> str:
    """All conditions of one row on one line; the interval of `after` as a bar."""
    low, high = scale(row)

    def place(value: float) -> float:
        return _EDGE + (_WIDTH - 2 * _EDGE) * (min(max(value, low), high) - low) / (high - low)

    shapes = [f'<line class="track" x1="{_EDGE}" x2="{_WIDTH - _EDGE}" y1="{_MIDDLE}" y2="{_MIDDLE}"/>']
    if row.chance is not None:
        x = place(row.chance)
        shapes.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{_MIDDLE - 13}" y2="{_MIDDLE + 13}"/>')
    for column in sorted(row.cells, key=lambda column: column == "after"):  # ours on top
        value = row.cells[column]
        shapes.append(
            f'<line class="bar {column}" x1="{place(value.low):.1f}" x2="{place(value.high):.1f}" '
            f'y1="{_MIDDLE}" y2="{_MIDDLE}"/>'
        )
        shapes.append(mark(column, place((value.lowest + value.highest) / 2), _MIDDLE))
    words = ", ".join(f"{column} {value}" for column, value in row.cells.items())
    return (
        f'<svg class="marks" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(row.label)}: {escape(words)}">{"".join(shapes)}</svg>'
    )


def scale(row: Row) -> tuple[float, float]:
    """The ends of a row's line: 0 to 1 for accuracies, else a little beyond the intervals."""
    if row.unit == "accuracy":
        return 0.0, 1.0
    low, high = min(v.low for v in row.cells.values()), max(v.high for v in row.cells.values())
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def mark(column: Column, x: float, y: float) -> str:
    """The shape of one condition; shapes differ, so that colour is not needed to tell them apart."""
    shapes: dict[Column, str] = {
        "before": f'<circle class="mark before" cx="{x:.1f}" cy="{y}" r="4"/>',
        "after": f'<circle class="mark after" cx="{x:.1f}" cy="{y}" r="5.5"/>',
        "blind": f'<rect class="mark blind" x="{x - 3.5:.1f}" y="{y - 3.5}" width="7" height="7"/>',
        "shuffled": f'<path class="mark shuffled" d="M{x:.1f},{y - 5} l5,5 l-5,5 l-5,-5 Z"/>',
        "cosine": f'<path class="mark cosine" d="M{x:.1f},{y - 5} l5,9 l-10,0 Z"/>',
    }
    return shapes[column]


def legend(columns: Sequence[Column]) -> str:
    """The shapes and what they stand for."""
    names = {
        "before": "before training",
        "after": "after",
        "blind": "blank picture",
        "shuffled": "another item’s picture",
        "cosine": "joint alone (cosine)",
    }
    shown = [
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{mark(column, 7, 7)}</svg>{names[column]}</li>'
        for column in COLUMNS
        if column in columns
    ]
    chance = '<svg viewBox="0 0 14 14" aria-hidden="true"><line class="chance" x1="7" x2="7" y1="1" y2="13"/></svg>'
    return f'<ul class="legend">{"".join(shown)}<li>{chance}chance</li></ul>'


# ---------------------------------------------------------------------------------------------- curves

_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 180, 36, 8, 10, 28


def curve(losses: Curve) -> str:
    """Training loss (thin: as logged; thick: smoothed) and validation loss (dots) over steps."""
    train, validation = thin(losses.train), list(losses.validation)
    smooth = running_mean(train)
    every = [*smooth, *validation] or [(0.0, 0.0)]
    last = max(x for x, _ in [*train, *every]) or 1.0
    ticks = nice_ticks(min(y for _, y in every), max(y for _, y in every))
    low, high = ticks[0], ticks[-1]

    def at(point: Point) -> str:
        x = _LEFT + (_W - _LEFT - _RIGHT) * point[0] / last
        share = (min(max(point[1], low), high) - low) / (high - low)
        return f"{x:.1f},{_H - _BOTTOM - (_H - _TOP - _BOTTOM) * share:.1f}"

    grid = "".join(_tick(at((0, tick)), number_short(tick)) for tick in ticks)
    lines = f'<polyline class="raw" points="{" ".join(map(at, train))}"/>'
    lines += f'<polyline class="train" points="{" ".join(map(at, smooth))}"/>'
    if validation:
        lines += f'<polyline class="validation" points="{" ".join(map(at, validation))}"/>'
    dots = "".join('<circle class="validation" cx="{}" cy="{}" r="3.5"/>'.format(*at(p).split(",")) for p in validation)
    steps = (
        f'<text class="tick" x="{_LEFT}" y="{_H - 10}">0</text>'
        f'<text class="tick" x="{_W - _RIGHT}" y="{_H - 10}" text-anchor="end">{last:,.0f} steps</text>'
    )
    words = f"loss of stage {losses.stage}: " + _story(train, validation)
    return (
        f'<svg class="curve" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(words)}">'
        f"{grid}{lines}{dots}{steps}</svg>"
    )


def _tick(point: str, text: str) -> str:
    y = float(point.split(",")[1])
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _story(train: Sequence[Point], validation: Sequence[Point]) -> str:
    lines = {"training": train, "validation": validation}
    return ", ".join(f"{name} {line[0][1]:.2f} to {line[-1][1]:.2f}" for name, line in lines.items() if line)


def thin(points: Sequence[Point], most: int = 240) -> list[Point]:
    """At most `most` points: means of equal blocks."""
    width = max(1, math.ceil(len(points) / most))
    blocks = [points[start : start + width] for start in range(0, len(points), width)]
    return [(block[-1][0], sum(y for _, y in block) / len(block)) for block in blocks]


def running_mean(points: Sequence[Point]) -> list[Point]:
    """The same points, each averaged with its neighbours within 3 % of the line to either side."""
    reach = max(1, round(0.03 * len(points)))
    means = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - reach) : index + reach + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, some `about` steps apart."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= span / about)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [tick * step for tick in range(first, last + 1)]


def number_short(value: float) -> str:
    return f"{value:.4g}" if value else "0"


# ---------------------------------------------------------------------------------------------- pictures


def data_url(picture: Pillow.Image, largest: int = 288) -> str:
    """A small copy of a picture as text that a page can hold."""
    small = picture.convert("RGB")
    if min(small.size) < 96:  # tiny pictures keep their hard pixels
        factor = math.ceil(192 / min(small.size))
        small = small.resize((small.width * factor, small.height * factor), Pillow.Resampling.NEAREST)
    small.thumbnail((largest, largest), Pillow.Resampling.LANCZOS)
    file = BytesIO()
    small.save(file, "WEBP", quality=84, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def bars(choices: Sequence[str], scores: Sequence[float], answer: str, most: int = 4) -> str:
    """The likeliest choices, and the answer, with their shares of the probability among the choices."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    shares = sorted(((weight / sum(weights), choice) for weight, choice in zip(weights, choices)), reverse=True)
    shown = shares[:most]
    if answer not in [choice for _, choice in shown]:
        shown = [*shares[: most - 1], *[pair for pair in shares if pair[1] == answer]]
    return f'<ul class="bars">{"".join(_bar(choice, share, choice == answer) for share, choice in shown)}</ul>'


def _bar(choice: str, share: float, true: bool) -> str:
    return (
        f'<li{" class=true" if true else ""}><span class="choice">{escape(choice)}</span>'
        f'<span class="share"><i style="width:{100 * share:.1f}%"></i></span>'
        f'<span class="percent">{percent(share)}</span></li>'
    )


def percent(share: float) -> str:
    """0.873 -> 87 %; tiny shares are not rounded to nothing."""
    return "&lt;1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"
