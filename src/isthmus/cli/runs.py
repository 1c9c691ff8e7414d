"""`isthmus runs`: what has been trained so far, how far it came, and the curves of several runs in one picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isthmus.cli.options import AsJson

if TYPE_CHECKING:
    from rich.table import Table

State = Literal["new", "training", "stopped", "done"]
Folders = Annotated[
    list[Path] | None, typer.Argument(help="Folders of runs, or folders that hold some.  \\[default: runs]")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the loss of all their stages into this PNG.")]


SHOWN = 4
"""Fields that are told of a run that has more otherwise."""


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
    fields: dict[str, Any]
    """The recipe's, by dotted names."""
    locked: bool = False
    """Whether a process is at work in it."""

    @property
    def state(self) -> State:
        states = {stage.state for stage in self.stages}
        return "training" if self.locked else states.pop() if len(states) == 1 else "stopped"

    def plain(self, differs: dict[str, Any]) -> dict[str, Any]:
        told = {name: value for name, value in asdict(self).items() if name not in ("fields", "locked")}
        return told | {"state": self.state, "differs": differs}


def runs(folders: Folders = None, plot: Plot = None, as_json: AsJson = False) -> None:
    """List runs with state, stage, step, loss, validation and speed; newest last.

    A run is `training` while a process is at work in it, and `stopped` when it was interrupted: `isthmus train FOLDER`
    goes on with it. Below a run stands what it has otherwise than the recipe of its name, or else than the first run of
    that name.
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
        typer.echo(json.dumps([run.plain(differs(run, found)) for run in found], indent=2))
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

    from isthmus.training import locks
    from isthmus.types import DataError

    try:
        recipe = json.loads((folder / "run.json").read_text(encoding="utf-8"))["recipe"]
        locked = locks.taken(folder / "lock")
        stages = tuple(_stage(folder / stage["name"], stage["name"], locked) for stage in recipe["stages"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: its run.json cannot be read ({error})", "remove the folder") from None
    told = [file for file in (folder / "run.json", *folder.glob("*/metrics.jsonl")) if file.is_file()]
    last = max(file.stat().st_mtime for file in told)
    date = datetime.fromtimestamp(last).isoformat(" ", "minutes")
    return RunState(str(folder), recipe["name"], date, stages, dict(_fields(recipe)), locked)


def differs(run: RunState, found: list[RunState]) -> dict[str, Any]:
    """What a run has otherwise than the recipe of its name, or where that is no recipe of ours, the first such run."""
    from isthmus.recipes import BOOK

    if run.recipe in BOOK:
        base = dict(_fields(BOOK[run.recipe]().model_dump(mode="json")))
    else:
        base = next(each for each in found if each.recipe == run.recipe).fields | {"seed": 0}
    return {name: value for name, value in run.fields.items() if value is not None and value != base.get(name)}


def _fields(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that training follows from, by its dotted name; stages by theirs."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{above}{key}.")
        elif key == "stages" and not above:
            for stage in value:
                yield from _fields({**stage, "name": None}, f"stages.{stage['name']}.")
        elif above or key not in ("name", "about"):
            yield above + key, value


def table(found: list[RunState]) -> Table:
    """A line per run, and below it one per stage."""
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False)
    view.add_column("run", overflow="fold")
    view.add_column("state", no_wrap=True)
    for name in ("step", "loss", "validation", "tokens/s", "last"):
        view.add_column(name, justify="right", no_wrap=True)
    colour = {"done": "green", "training": "cyan", "stopped": "yellow", "new": "dim"}
    for run in found:
        state = f"[{colour[run.state]}]{run.state}[/]"
        view.add_row(Text.assemble((run.folder, "bold"), f" {run.recipe}"), state, "", "", "", "", run.date)
        if own := [f"{name}={json.dumps(value)}" for name, value in differs(run, found).items()]:
            more = f" and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
            view.add_row(Text("  " + " ".join(own[:SHOWN]) + more, style="dim"))
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


def _stage(folder: Path, name: str, locked: bool) -> StageState:
    from statistics import median

    from isthmus.training.log import read_rows

    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    manifest = folder / "manifest.json"
    taken = steps[-1]["step"] if steps else 0
    planned = json.loads(manifest.read_text())["steps"] if manifest.is_file() else None
    # a comparison's trial of a learning rate leaves its report and no model
    done = (folder / "model").is_dir() or (taken == planned and (folder.parent / "report.json").is_file())
    return StageState(
        name,
        "done" if done else "new" if planned is None else "training" if locked else "stopped",
        taken,
        planned,
        steps[-1]["loss"] if steps else None,
        next((row["validation_loss"] for row in reversed(rows) if "validation_loss" in row), None),
        median(row["tokens_per_second"] for row in steps) if steps else None,
    )


def _plot(found: list[RunState], file: Path) -> None:
    from isthmus.training.curves import draw_together
    from isthmus.training.log import read_rows
    from isthmus.types import DataError

    curves = {
        f"{name} · {stage.name}": read_rows(Path(run.folder) / stage.name / "metrics.jsonl")
        for name, run in zip(_short([run.folder for run in found]), found)
        for stage in run.stages
    }
    if not draw_together(curves, file):
        raise DataError("none of these runs has made a step", "wait for the first, or name other folders")


def _short(folders: list[str]) -> list[str]:
    """Folders by what follows the one that all of them lie in: `llava/seed0`."""
    paths = [Path(folder).absolute() for folder in folders]
    above = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(above).as_posix() for path in paths]


def _number(value: Any, how: str) -> str:
    return "" if value is None else format(value, how)
