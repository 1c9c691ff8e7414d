"""Pictures composed of sprites on a plain background, described exactly before they are drawn.

A scene is a small frozen value. Its key names everything that its pixels depend on, so caches recognise it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from isthmus.data import sprites
from isthmus.data.concepts import alike, names

RENDERER = 1
"""Part of every key; raised whenever the same scene would be drawn differently."""
COLOURS = {
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "red": (214, 66, 60),
    "orange": (240, 148, 48),
    "yellow": (246, 218, 80),
    "green": (96, 172, 88),
    "blue": (84, 138, 214),
    "purple": (146, 98, 188),
    "pink": (244, 166, 196),
    "brown": (142, 102, 72),
}
Texture: TypeAlias = Literal["flat", "gradient", "noise", "stripes"]
Box: TypeAlias = tuple[float, float, float, float]


@dataclass(frozen=True)
class Background:
    """One named colour, in one of a few textures that keep its name true."""

    colour: str
    texture: Texture
    seed: int

    def draw(self, side: int) -> Image.Image:
        """RGB, `side` by `side`."""
        random = np.random.default_rng(self.seed)
        light = _FIELDS[self.texture](side, random)  # [side, side] within -1 .. 1
        base = np.array(COLOURS[self.colour]) * random.uniform(0.94, 1.04)
        pixels = base * (1 + 0.09 * light[..., None])
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _flat(side: int, random: np.random.Generator) -> np.ndarray:
    return np.zeros((side, side), np.float32)


def _gradient(side: int, random: np.random.Generator) -> np.ndarray:
    angle = random.uniform(0, 2 * np.pi)
    line = np.linspace(-1, 1, side, dtype=np.float32)
    return (np.cos(angle) * line[None] + np.sin(angle) * line[:, None]) / np.sqrt(2)


def _noise(side: int, random: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(random.uniform(-1, 1, (7, 7)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).clip(-1, 1)


def _stripes(side: int, random: np.random.Generator) -> np.ndarray:
    return np.sign(np.sin(_gradient(side, random) * random.uniform(12, 30)))


_FIELDS: dict[Texture, Callable[[int, np.random.Generator], np.ndarray]] = {
    "flat": _flat,
    "gradient": _gradient,
    "noise": _noise,
    "stripes": _stripes,
}


@dataclass(frozen=True)
class Placed:
    """A concept's drawing at exact pixels of the scene."""

    char: str
    left: int
    top: int
    width: int
    height: int
    cell: tuple[int, int]
    """Row and column of the layout; objects of different columns never overlap horizontally, nor rows vertically."""

    @property
    def name(self) -> str:
        return names()[self.char]


@dataclass(frozen=True)
class Scene:
    """A picture that draws itself: objects on a background, `size` pixels square (`types.Drawn`)."""

    seed: str
    size: int
    style: str
    objects: tuple[Placed, ...]
    background: Background

    @functools.cached_property
    def key(self) -> str:
        return hashlib.sha256(f"{RENDERER} {self!r}".encode()).hexdigest()[:32]

    def draw(self) -> Image.Image:
        """RGB, `size` by `size`."""
        picture = self.background.draw(self.size)
        for item in self.objects:
            drawing = sprites.sprite(item.char, self.style, item.width, item.height)
            picture.paste(drawing, (item.left, item.top), drawing)
        return picture

    @property
    def counts(self) -> dict[str, int]:
        """How often each concept appears, by character, in order of placement."""
        counts: dict[str, int] = {}
        for item in self.objects:
            counts[item.char] = counts.get(item.char, 0) + 1
        return counts

    @property
    def boxes(self) -> tuple[tuple[str, Box], ...]:
        """Names with normalised xyxy boxes, exact to the pixel."""
        return tuple((item.name, self._box(item)) for item in self.objects)

    def _box(self, item: Placed) -> Box:
        corners = (item.left, item.top, item.left + item.width, item.top + item.height)
        left, top, right, bottom = (corner / self.size for corner in corners)
        return left, top, right, bottom


def compose(seed: str, chars: Sequence[str], size: int, style: str) -> Scene:
    """A scene of these concepts, everything else decided by the seed."""
    random = Random(seed)
    cells = 1 if len(chars) == 1 else 2 if len(chars) <= 3 else 3
    places = random.sample([(row, column) for row in range(cells) for column in range(cells)], len(chars))
    objects = tuple(_place(char, cell, size // cells, style, random) for char, cell in zip(chars, places))
    background = Background(random.choice(list(COLOURS)), random.choice(list(_FIELDS)), random.getrandbits(32))
    return Scene(seed, size, style, objects, background)


def _place(char: str, cell: tuple[int, int], room: int, style: str, random: Random) -> Placed:
    """A concept of random size at a random place inside its cell of the layout, with its own proportions."""
    longer = random.uniform(0.6, 0.94) * room
    ratio = sprites.aspect(char, style)
    width = max(2, round(longer * min(1.0, ratio)))
    height = max(2, round(longer * min(1.0, 1 / ratio)))
    left = cell[1] * room + random.randint(0, room - width)
    top = cell[0] * room + random.randint(0, room - height)
    return Placed(char, left, top, width, height, cell)


def layout(seed: str, pool: Sequence[str], size: int, style: str) -> Scene:
    """Two to five different concepts of the pool."""
    random = Random(f"layout {seed}")
    return compose(seed, pick(random, pool, random.randint(2, 5)), size, style)


def crowd(seed: str, pool: Sequence[str], size: int, style: str) -> tuple[Scene, str]:
    """One concept nought to five times among one to three others, two to six objects in all; and that concept."""
    random = Random(f"crowd {seed}")
    copies = random.randint(0, 5)
    main, *others = pick(random, pool, 1 + random.randint(max(1, 2 - copies), min(3, 6 - copies)))
    chars = [main] * copies + others
    random.shuffle(chars)
    return compose(seed, chars, size, style), main


def pick(random: Random, pool: Sequence[str], count: int, but: Sequence[str] = ()) -> list[str]:
    """`count` concepts of the pool of which no name may stand for another's, nor for one of `but`."""
    chosen: list[str] = []
    while len(chosen) < count:
        char = random.choice(pool)
        if not any(alike(names()[char], names()[other]) for other in (*chosen, *but)):
            chosen.append(char)
    return chosen
