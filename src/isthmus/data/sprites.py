"""Drawings of concepts: OpenMoji through Pillow, and four other styles from SVG through resvg where it is installed.

A sprite is cut to the drawing itself, so that its box in a scene is exact.
"""

from __future__ import annotations

import io
import json
from functools import cache, lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from isthmus import assets
from isthmus.assets import packages
from isthmus.config import nearest
from isthmus.data.concepts import names
from isthmus.types import ConfigError, IsthmusError

OPENMOJI = "openmoji"
PACKAGES = {
    "noto": packages.NOTO,
    "twemoji": packages.TWEMOJI,
    "fluent": packages.FLUENT,
    "emojione": packages.EMOJIONE,
}
STYLES = (OPENMOJI, *PACKAGES)
PROBE = 64
"""Pixels at which a drawing's proportions are measured."""
VISIBLE = [255 * (alpha > 8) for alpha in range(256)]
"""Of every alpha, whether what is drawn with it can be seen."""


def check_style(style: str) -> None:
    """Raises ConfigError for a style that there is not."""
    if style not in STYLES:
        raise ConfigError(f"no drawing style {style!r}{nearest(style, STYLES)}", f"use one of {', '.join(STYLES)}")


def package(style: str) -> packages.Package:
    """The package that a style comes from."""
    return packages.OPENMOJI if style == OPENMOJI else PACKAGES[style]


def sprite(char: str, style: str, width: int, height: int) -> Image.Image:
    """The drawing of a concept, RGBA, exactly `width` by `height` pixels, nothing around it."""
    drawing = _render(char, style, max(width, height))
    return drawing.resize((width, height), Image.Resampling.LANCZOS)


@cache
def aspect(char: str, style: str) -> float:
    """Width over height of the drawing itself."""
    drawing = _render(char, style, PROBE)
    return drawing.width / drawing.height


@cache
def shared() -> frozenset[str]:
    """Concepts that are drawn in every style."""
    return frozenset(char for char in names() if all(_body(char, style) for style in PACKAGES))


def _render(char: str, style: str, side: int) -> Image.Image:
    """The drawing cut to its visible part, about `side` pixels large."""
    canvas = _openmoji(char, side) if style == OPENMOJI else _svg(char, style, side)
    box = canvas.getchannel("A").point(VISIBLE).getbbox()
    if box is None:
        raise IsthmusError(f"style {style} has no drawing of {names()[char]!r}", "use a concept that all styles share")
    return canvas.crop(box)


def _openmoji(char: str, side: int) -> Image.Image:
    size = -(-side // 16) * 16  # few sizes, so that few fonts are opened
    canvas = Image.new("RGBA", (2 * size, 2 * size))
    ImageDraw.Draw(canvas).text((size // 2, size // 2), char, font=_font(size), embedded_color=True)
    return canvas


@lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(assets.locate(packages.OPENMOJI, packages.OPENMOJI.members[0])), size)


def _svg(char: str, style: str, side: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError:
        raise IsthmusError("resvg-py is not installed", "pip install 'isthmus[styles]'") from None
    icons = _icons(style)
    frame = f'viewBox="0 0 {icons.get("width", 16)} {icons.get("height", 16)}"'
    text = f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>{_body(char, style)}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=text, width=side)))).convert("RGBA")


def _body(char: str, style: str) -> str:
    """The SVG elements of a drawing, or nothing where the style has none of this concept."""
    icons = _icons(style)
    name = _icon_names().get(f"{ord(char):x}", "")
    alias = icons.get("aliases", {}).get(name, {})
    if name not in icons["icons"] and set(alias) == {"parent"}:
        name = alias["parent"]
    return icons["icons"].get(name, {}).get("body", "")


@cache
def _icons(style: str) -> dict[str, Any]:
    return json.loads(assets.locate(PACKAGES[style], "package/icons.json").read_text(encoding="utf-8"))


@cache
def _icon_names() -> dict[str, str]:
    """Icon names by code point; the packages share their names, and Noto lists them all."""
    return json.loads(assets.locate(packages.NOTO, "package/chars.json").read_text(encoding="utf-8"))
