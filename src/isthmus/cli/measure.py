"""`isthmus eval`: tasks with controls and intervals, predictions kept per item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.options import AsJson, Device, DType, Out

TASKS = "naming,easy-vqa,presence,counting,relation"


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory that `isthmus train` wrote, or a hub name.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated task names.")] = TASKS,
    limit: Annotated[int | None, typer.Option(help="Items per task.  [default: 500]")] = None,
    controls: Annotated[str, typer.Option(help="Baselines beside each task, or none.")] = "blind,shuffled",
    seed: Annotated[int, typer.Option(help="Draws the items and the exchange of pictures.")] = 0,
    out: Out = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model: every task beside its blind and shuffled-picture baselines, with intervals."""
    from dataclasses import asdict

    from rich.console import Console

    from isthmus.assembly import load
    from isthmus.cli.options import on
    from isthmus.config import TaskConfig, check
    from isthmus.evaluation.measure import build, measure
    from isthmus.evaluation.report import table_of
    from isthmus.evaluation.results import rows
    from isthmus.training import log
    from isthmus.training.machine import arithmetic

    console = Console(stderr=as_json, highlight=False)
    where = on(device)
    chosen = [] if controls == "none" else controls.split(",")
    wanted = [
        check(TaskConfig, {"name": name, "limit": limit, "controls": chosen}, "eval") for name in tasks.split(",")
    ]
    loaded = load(model, arithmetic(dtype, where), where)
    folder = out or Path("runs") / "eval" / (Path(model).parent.name or Path(model).name)
    with log.counting(console, "measuring") as progress:
        measured = measure(
            loaded,
            build(wanted, seed),
            seed,
            folder,
            settings={"model": str(model)},
            progress=lambda what, done, total: progress(done, total),
        )
    found = [row for task, runs in measured.values() for row in rows(task, runs, seed)]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found], indent=2))
        return
    console.print(table_of(found))
    console.print(f"predictions per item: {folder}")
