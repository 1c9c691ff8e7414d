"""`isthmus runs`: what has been trained so far, how far it came, and the curves of several runs in one picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isthmus.cli.options import AsJson

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["new", "unfinished", "done"]
Folders = Annotated[
    list[Path] | None, typer.Argument(help="Folders of runs, or folders that hold some.  \\[default: runs]")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the loss of all their stages into this PNG.")]


@dataclass(frozen=True)
class StageState:
    """One stage of a run, as its folder tells."""

    name: str
    state: State
    step: int
    steps: int | None
    """None until the stage has begun."""
    loss: float | None
    validation: float | None
    """The last one."""
    tokens_per_second: float | None
    """The median over its steps."""


@dataclass(frozen=True)
class RunState:
    """One run: a folder, its recipe and its stages in order."""

    folder: str
    recipe: str
    date: str
    """When it last told something."""
    stages: tuple[StageState, ...]

    @property
    def state(self) -> State:
        states = {stage.state for stage in self.stages}
        return states.pop() if len(states) == 1 else "unfinished"


def runs(folders: Folders = None, plot: Plot = None, as_json: AsJson = False) -> None:
    """List runs with state, stage, step, loss, validation and speed; newest last.

    A run is `unfinished` while it trains and when it was interrupted: the same `isthmus train` goes on with it.
    """
    from rich.console import Console

    from isthmus.types import ConfigError

    places = folders or [Path("runs")]
    found = sorted((read(folder) for folder in find(places)), key=lambda run: run.date)
    if not found:
        raise ConfigError(
            f"no runs in {', '.join(map(str, places))}", "name the folder that `isthmus train --out` wrote"
        )
    if plot is not None:
        _plot(found, plot)
    if as_json:
        typer.echo(json.dumps([asdict(run) | {"state": run.state} for run in found], indent=2))
        return
    console = Console(highlight=False)
    console.print(table(found))
    if plot is not None:
        console.print(f"curves  {plot}", soft_wrap=True)


def find(folders: list[Path]) -> Iterator[Path]:
    """The run folders among these, and those up to two levels below them."""
    for folder in folders:
        notes = [folder / "run.json", *sorted(folder.glob("*/run.json")), *sorted(folder.glob("*/*/run.json"))]
        yield from (note.parent for note in notes if note.is_file())


def read(folder: Path) -> RunState:
    """What a run's folder tells, without reading any model.

    Raises:
        DataError: its note cannot be read.
    """
    from datetime import datetime

    from isthmus.types import DataError

    try:
        recipe = json.loads((folder / "run.json").read_text(encoding="utf-8"))["recipe"]
        stages = tuple(_stage(folder / stage["name"], stage["name"]) for stage in recipe["stages"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: its run.json cannot be read ({error})", "remove the folder") from None
    told = [file for file in (folder / "run.json", *folder.glob("*/metrics.jsonl")) if file.is_file()]
    last = max(file.stat().st_mtime for file in told)
    return RunState(str(folder), recipe["name"], datetime.fromtimestamp(last).isoformat(" ", "minutes"), stages)


def table(found: list[RunState]) -> Table:
    """A line per run, and below it one per stage."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    view.add_column("run", overflow="fold")
    view.add_column("state", no_wrap=True)
    for name in ("step", "loss", "validation", "tokens/s", "last"):
        view.add_column(name, justify="right", no_wrap=True)
    colour = {"done": "green", "unfinished": "yellow", "new": "dim"}
    for run in found:
        state = f"[{colour[run.state]}]{run.state}[/]"
        view.add_row(f"[bold]{run.folder}[/] {run.recipe}", state, "", "", "", "", run.date)
        for stage in run.stages:
            view.add_row(
                f"  {stage.name}",
                f"[{colour[stage.state]}]{stage.state}[/]",
                "" if stage.steps is None else f"{stage.step:,}/{stage.steps:,}",
                _number(stage.loss, ".4f"),
                _number(stage.validation, ".4f"),
                _number(stage.tokens_per_second, ",.0f"),
            )
    return view


def _stage(folder: Path, name: str) -> StageState:
    from statistics import median

    from isthmus.training.log import read_rows

    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    manifest = folder / "manifest.json"
    done = (folder / "model").is_dir()
    return StageState(
        name,
        "done" if done else "unfinished" if manifest.is_file() else "new",
        steps[-1]["step"] if steps else 0,
        json.loads(manifest.read_text())["steps"] if manifest.is_file() else None,
        steps[-1]["loss"] if steps else None,
        next((row["validation_loss"] for row in reversed(rows) if "validation_loss" in row), None),
        median(row["tokens_per_second"] for row in steps) if steps else None,
    )


def _plot(found: list[RunState], file: Path) -> None:
    from isthmus.training.curves import draw_together
    from isthmus.training.log import read_rows
    from isthmus.types import DataError

    curves = {
        f"{Path(run.folder).name} · {stage.name}": read_rows(Path(run.folder) / stage.name / "metrics.jsonl")
        for run in found
        for stage in run.stages
    }
    if not draw_together(curves, file):
        raise DataError("none of these runs has made a step", "wait for the first, or name other folders")


def _number(value: Any, how: str) -> str:
    return "" if value is None else format(value, how)
