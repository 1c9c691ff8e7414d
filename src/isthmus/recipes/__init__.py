"""Every published system as a function that returns a `Recipe`, with its size and ablations as arguments.

`size="embedded"` runs on a laptop with parts that registry packages carry; `size="published"` is the system as its
authors trained it.
"""

from __future__ import annotations

from collections.abc import Callable

from isthmus.config import Recipe, nearest
from isthmus.errors import ConfigError
from isthmus.recipes.demo import demo
from isthmus.recipes.llava import llava

BOOK: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "llava": lambda: llava("embedded"),
    "llava-linear": lambda: llava("embedded", projector="linear"),
    "llava-1.5-7b": lambda: llava("published"),
    "llava-v1-7b": lambda: llava("published", projector="linear"),
}
"""Recipes by the name that the command line knows."""


def named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ConfigError: no such recipe; the nearest is suggested.
    """
    if name not in BOOK:
        raise ConfigError(
            f"no recipe named {name!r}{nearest(name, list(BOOK))}", "`isthmus recipes` lists them; a file ends in .yaml"
        )
    return BOOK[name]()


def titles() -> dict[str, str]:
    """One line about every recipe."""
    return {name: build().about for name, build in BOOK.items()}
