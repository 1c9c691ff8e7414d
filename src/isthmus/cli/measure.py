"""`isthmus eval`: tasks with controls and intervals, predictions kept per item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.options import AsJson, Device, DType, Out


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory that `isthmus train` wrote, or a hub name.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated task names.")] = "naming,easy-vqa,presence,counting,relation",
    limit: Annotated[int | None, typer.Option(help="Items per task.  [default: 500]")] = None,
    controls: Annotated[str, typer.Option(help="Baselines beside each task: blind, shuffled, or none.")] = "blind,shuffled",
    seed: Annotated[int, typer.Option(help="Draws the items and the exchange of pictures.")] = 0,
    out: Out = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model: every task beside its blind and shuffled-picture baselines, with intervals."""
    from rich.console import Console

    from isthmus.assembly import load
    from isthmus.cli.options import on
    from isthmus.config import TaskConfig
    from isthmus.evaluation import report
    from isthmus.evaluation.measure import measure
    from isthmus.training.optimizer import arithmetic

    where = on(device)
    loaded = load(model, arithmetic(dtype, where), where)
    chosen = tuple(name for name in controls.split(",") if name not in ("", "none"))
    wanted = [TaskConfig(name=name, limit=limit, controls=chosen) for name in tasks.split(",")]
    folder = out or Path("runs") / "eval" / Path(model).name
    rows = measure(loaded, wanted, seed, folder)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        Console().print(report.table(rows))
        typer.echo(f"predictions per item: {folder}")
