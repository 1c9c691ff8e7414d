"""Planned and was: a run's forecast is kept in its folder, and set beside what the stages then took.

`plan.json` is written before training and `planned.json` after it; nothing here stops a run that cannot be forecast.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from isthmus.config import Recipe
from isthmus.files import read_note, write_text, writing
from isthmus.forecast import kept
from isthmus.training.log import read_rows

PLAN, BOTH = "plan.json", "planned.json"
SETTLED = 2
"""Steps at the start that are not typical: caches and kernels warm up."""
FEW = "too few to time"


@dataclass(frozen=True)
class Stage:
    """One stage: its forecast and what it took, per step."""

    name: str
    planned: dict[str, float | None]
    was: dict[str, float | None]
    """No steps per second where there were too few to time."""

    @property
    def plain(self) -> dict[str, Any]:
        return {"stage": self.name, "planned": self.planned, "was": self.was}


def plan(recipe: Recipe, folder: Path, device: torch.device, console: Console) -> None:
    """Write a run's forecast into its folder, unless it is there; a step that cannot be traced is said and left."""
    file = folder / PLAN
    if file.is_file() or not recipe.stages:
        return
    try:
        made = kept.planned(recipe, device)
    except Exception as error:  # whatever a forecast stumbles over, it must not keep a run from its training
        console.print(f"no forecast of this run: {type(error).__name__}: {error}".splitlines()[0], markup=False)
        return
    with writing(file):
        write_text(file, json.dumps(made, indent=1))


def compare(folder: Path) -> list[Stage]:
    """Every finished stage of a run that was planned, with what it took, and write both into the folder."""
    found = [
        Stage(told["name"], _planned(told), was)
        for told in read_note(folder / PLAN).get("stages", ())
        if (was := measured(folder / told["name"]))
    ]
    if not found:
        return []
    write_text(folder / BOTH, json.dumps([stage.plain for stage in found], indent=1))
    return found


def table(stages: list[Stage]) -> Table:
    """Planned / was, for the terminal."""
    view = Table("stage", "steps/s", "GFLOP per step", "peak memory, GB", box=None, title="planned / was")
    for stage in stages:
        view.add_row(stage.name, *(f"{_short(planned)} / {_short(was, FEW)}" for planned, was in _pairs(stage)))
    return view


def measured(folder: Path) -> dict[str, float | None]:
    """What a stage took, from its own log: the median step, the mean of its operations, the most memory.

    The first steps count only where there are no others, and are never timed.
    """
    every = [row for row in read_rows(folder / "metrics.jsonl") if "operations" in row]
    if not every:
        return {}
    settled = every[SETTLED:]
    rows = settled or every
    return {
        "steps_per_second": 1 / statistics.median(row["seconds"] for row in settled) if settled else None,
        "flops": statistics.mean(row["operations"] for row in rows),
        "peak": max(row["memory_gb"] for row in rows) * 1e9,
    }


def _planned(told: dict[str, Any]) -> dict[str, float | None]:
    seconds = told["step_seconds"]
    return {"steps_per_second": 1 / seconds if seconds else None, "flops": told["flops"], "peak": told["peak"]}


def _pairs(stage: Stage) -> Iterator[tuple[float | None, float | None]]:
    for name, unit in (("steps_per_second", 1.0), ("flops", 1e9), ("peak", 1e9)):
        planned, was = stage.planned[name], stage.was[name]
        yield None if planned is None else planned / unit, None if was is None else was / unit


def _short(value: float | None, none: str = "–") -> str:
    return none if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
