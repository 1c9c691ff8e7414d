"""The figures of the gap: pictures under words and heat as PNG (Pillow), curves over layers as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from torch import Tensor

from isthmus.data.media import Aspect, square
from isthmus.evaluation.drawing import nice_ticks, number_short
from isthmus.evaluation.escaping import escape

SIDE = 432
INK, PAPER = (20, 24, 27), (255, 255, 255)
LOSS, GAIN = (178, 58, 46), (11, 107, 116)
"""Where hiding a place costs the answer, and where it helps."""
LOOK = (240, 148, 48)


def base(picture: Pillow.Image, aspect: Aspect) -> Pillow.Image:
    """The square that the encoder sees, at the size of a figure."""
    return square(picture.convert("RGB"), aspect, SIDE, (128, 128, 128))


def lens(picture: Pillow.Image, tokens: Sequence[Sequence[tuple[str, float]]], shape: tuple[int, int]) -> Pillow.Image:
    """Each token's likeliest words over its place, as many as there is room for, the surer the darker their ground."""
    rows, columns = shape
    image = picture.convert("RGBA")
    layer = Pillow.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    width, height = SIDE / columns, SIDE / rows
    fit = max(1, min(3, int(height // 36)))
    for number, words in enumerate(tokens):
        row, column = divmod(number, columns)
        left, top = column * width, row * height
        draw.rectangle((left, top, left + width - 1, top + height - 1), outline=(255, 255, 255, 110))
        line = height / (fit + 0.4)
        for place, (word, share) in enumerate(words[:fit]):
            middle = top + height / 2 + line * (place - (min(fit, len(words)) - 1) / 2)
            _label(draw, word, share, (left + width / 2, middle), width - 6, line)
    return Pillow.alpha_composite(image, layer).convert("RGB")


def _label(
    draw: ImageDraw.ImageDraw, word: str, share: float, centre: tuple[float, float], width: float, height: float
) -> None:
    """A word on a plate that is as dark as the model is sure of it."""
    text = word if word.isprintable() and word else "·"
    size = min(24.0, height * 0.62)
    while (font := ImageFont.load_default(size)) and draw.textlength(text, font=font) > width - 8 and size > 10:
        size -= 1
    while draw.textlength(text, font=font) > width - 8 and len(text) > 2:
        text = text[:-2] + "…"
    half = draw.textlength(text, font=font) / 2 + 4
    x, y = centre
    plate = (x - half, y - size * 0.7, x + half, y + size * 0.7)
    draw.rounded_rectangle(plate, 4, fill=(*INK, round(90 + 145 * min(1.0, share))))
    draw.text((x, y), text, fill=PAPER, font=font, anchor="mm")


def attention(picture: Pillow.Image, map_RC: Tensor) -> Pillow.Image:
    """Where it looks: the most looked at place is fully coloured."""
    top = max(float(map_RC.max()), 1e-9)
    return _heat(picture, [[(LOOK, float(value) / top) for value in row] for row in map_RC.tolist()])


def occlusion(picture: Pillow.Image, map_RC: Tensor) -> Pillow.Image:
    """What hiding each place costs, red, or helps, blue-green, against the largest of the picture."""
    top = max(float(map_RC.abs().max()), 1e-9)
    cells = [[(LOSS if value > 0 else GAIN, abs(value) / top) for value in row] for row in map_RC.tolist()]
    return _heat(picture, cells)


def _heat(picture: Pillow.Image, cells: Sequence[Sequence[tuple[tuple[int, int, int], float]]]) -> Pillow.Image:
    pale = Pillow.blend(picture.convert("L").convert("RGB"), Pillow.new("RGB", picture.size, "white"), 0.35)
    layer = Pillow.new("RGBA", picture.size)
    draw = ImageDraw.Draw(layer)
    for row, values in enumerate(cells):
        for column, (colour, strength) in enumerate(values):
            left, right = (round(SIDE * edge / len(values)) for edge in (column, column + 1))
            top, bottom = (round(SIDE * edge / len(cells)) for edge in (row, row + 1))
            draw.rectangle((left, top, right - 1, bottom - 1), fill=(*colour, round(215 * strength)))
    return Pillow.alpha_composite(pale.convert("RGBA"), layer).convert("RGB")


# ---------------------------------------------------------------------------------------------- curves


_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 190, 44, 10, 12, 34
Line = Sequence[tuple[int, float]]


def curves(lines: Mapping[str, Line], words: str, level: float | None = None, log: bool = False) -> str:
    """One measure over layers, a line per model, which may be empty; `level` is what chance would give, dashed."""
    scale = math.log10 if log else float
    values = [scale(value) for line in lines.values() for _, value in line]
    values += [scale(level)] if level is not None else []
    low, high = min(values), max(values)
    ticks = [float(t) for t in range(math.floor(low), math.ceil(high) + 1)] if log else nice_ticks(min(0.0, low), high)
    ticks = ticks if len(ticks) > 1 else [ticks[0], ticks[0] + 1]
    last = max(layer for line in lines.values() for layer, _ in line) or 1

    def x(layer: float) -> float:
        return _LEFT + (_W - _LEFT - _RIGHT) * layer / last

    def y(value: float) -> float:
        return _H - _BOTTOM - (_H - _TOP - _BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{y(t) + 4:.1f}" text-anchor="end">'
        f"{_power(t) if log else number_short(t)}</text>"
        for t in ticks
    )
    foot = (
        f'<text class="tick" x="{_LEFT}" y="{_H - 16}">input</text>'
        f'<text class="tick" x="{_W - _RIGHT}" y="{_H - 16}" text-anchor="end">layer {last}</text>'
    )
    chance = ""
    if level is not None:
        at = y(scale(level))
        chance = f'<line class="chance" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
    drawn = "".join(
        _line([(x(layer), y(scale(value))) for layer, value in line], number)
        for number, line in enumerate(lines.values())
        if line
    )
    told = f"{words}: {_story(lines)}"
    return (
        f'<svg class="curve gap" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(told)}">'
        f"{grid}{chance}{drawn}{foot}</svg>"
    )


def _power(exponent: float) -> str:
    """3 -> 1k"""
    whole = int(exponent)
    return f"{10 ** (whole % 3)}{('', 'k', 'M')[whole // 3]}"


def _line(points: Sequence[tuple[float, float]], number: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(mark(x, y, number) for x, y in points[:: max(1, len(points) // 8)])
    return f'<polyline class="line{number}" points="{path}"/>{dots}'


def mark(x: float, y: float, number: int) -> str:
    """The shape of a series."""
    if number:
        return f'<rect class="dot{number}" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    return f'<circle class="dot{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'


def _story(lines: Mapping[str, Line]) -> str:
    return "; ".join(f"{name} from {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in lines.items() if line)
