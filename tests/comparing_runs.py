"""Small comparisons for tests: toy recipes that differ in their joint, and questions about scenes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.comparing.compare import compare
from isthmus.comparing.outcome import Outcome
from isthmus.config import Recipe, TaskConfig
from isthmus.training.toy import toy

TASKS = (TaskConfig(name="presence", limit=6), TaskConfig(name="counting", limit=6))


def recipes(folder: Path) -> list[Recipe]:
    """One with LLaVA-1.5's projector, and one with the first LLaVA's; a stage of eight steps each."""
    base = toy(folder / "toy").but(name="one", eval=TASKS)
    base = base.but(stages=base.stages[:1])
    return [base, base.but(name="two", aligner={"name": "llava", "options": {"projector": "linear"}})]


def small(folder: Path, *some: Recipe, **options: Any) -> Outcome:
    """A comparison in this process."""
    settings: dict[str, Any] = {"budget": "2-steps", "seeds": 2, "factors": (), "engine": "here"}
    quiet = Console(file=io.StringIO())
    return compare(some, out=folder / "comparison", console=quiet, **{**settings, **options})
