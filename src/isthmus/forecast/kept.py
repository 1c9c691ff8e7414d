"""Forecasts that were made before, in Isthmus's home: another seed or learning rate does not ask for another one.

Making one costs some ten seconds of a core, which a comparison would pay for every run of a recipe.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import isthmus
from isthmus import assets
from isthmus.config import Recipe
from isthmus.data import sets
from isthmus.files import read_note, write_text
from isthmus.forecast import forecast
from isthmus.training.machine import arithmetic

SOFTWARE = ("torch", "transformers")


def planned(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """A recipe's forecast as plain values: the one that was made of its like on this machine, or a new one.

    Raises:
        ConfigError, DataError, IsthmusError: see `forecast`.
    """
    file = assets.home() / "forecasts" / f"{key(recipe, device)}.json"
    if not read_note(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(forecast(recipe, device).plain(), indent=1))
    return read_note(file) | {"recipe": recipe.name, "fingerprint": recipe.fingerprint()}


def key(recipe: Recipe, device: torch.device) -> str:
    """Sixteen hex digits that change with whatever a forecast depends on: recipe, data, parts, machine, software."""
    told = recipe.model_dump(mode="json", exclude={"name", "about", "seed", "eval"})
    for stage in told["stages"]:
        del stage["lr"]
        for how in stage["train"].values():
            del how["lr"]
    here = [stage.data for stage in recipe.stages if all(map(sets.here, stage.data))]
    parts = [recipe.llm.source, *(one.source for kind in recipe.encoders.values() for one in (kind, *kind.also))]
    machine = [str(device), str(arithmetic(recipe.dtype, device)), torch.get_num_threads(), platform.node()]
    whole = [
        told,
        [sets.stamp(data, 0) for data in here],
        [_state(Path(source) / "config.json") for source in parts],
        machine,
        [code(Path(isthmus.__file__).parent), *(version(name) for name in SOFTWARE)],
    ]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def code(folder: Path) -> str:
    """Hex digits that change with the code in a folder, whose version stays the same while somebody works on it.

    All of the package's counts: what a forecast follows from is all over it, and 400 files are read in some 15 ms.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder).as_posix()} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _state(file: Path) -> list[int]:
    """When a file was written and how long it is; nothing where there is none."""
    return [file.stat().st_mtime_ns, file.stat().st_size] if file.is_file() else []
