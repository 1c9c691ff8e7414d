"""`isthmus eval`: tasks with controls and intervals, predictions kept per item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cli.options import AsJson, Device, DType, Endpoint, KeyEnv, Settings

Folder = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of predictions.  \\[default: runs/eval/RUN-STAGE]")
]
TASKS = "naming,easy-vqa,presence,counting,relation"


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory that `isthmus train` wrote, or a hub name.")],
    tasks: Annotated[str, typer.Option(help="Comma-separated task names.")] = TASKS,
    limit: Annotated[int | None, typer.Option(help="Items per task.  \\[default: 500]")] = None,
    controls: Annotated[str, typer.Option(help="Baselines beside each task, or none.")] = "blind,shuffled",
    data: Annotated[
        Path | None, typer.Option(help="Your own file; --tasks then says how it is scored: exact, vqa, yes-no, …")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Where the file's picture paths start from.")] = None,
    layout: Annotated[str | None, typer.Option("--format", help="Its layout.  \\[default: told from it]")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Demonstrations before each question.")] = None,
    seed: Annotated[int, typer.Option(help="Draws items, demonstrations and the exchange of pictures.")] = 0,
    out: Folder = None,
    device: Device = "auto",
    dtype: DType = "auto",
    endpoint: Endpoint = None,
    key_env: KeyEnv = None,
    remote: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: every task beside its blind and shuffled-picture baselines, with intervals."""
    from dataclasses import asdict

    from rich.console import Console

    from isthmus import storage
    from isthmus.assembly import load
    from isthmus.cli.options import on, remote_of
    from isthmus.config import TaskConfig, check
    from isthmus.evaluation import baseline
    from isthmus.evaluation.measure import build, measure
    from isthmus.evaluation.report import table_of
    from isthmus.evaluation.results import rows
    from isthmus.training import log
    from isthmus.training.machine import arithmetic

    console = Console(stderr=as_json, highlight=False)
    where = on(device)
    chosen = [] if controls == "none" else controls.split(",")
    asked = _options(data, images, layout) | ({} if shots is None else {"shots": shots})
    common = {"limit": limit, "controls": chosen, "options": asked}
    wanted = [check(TaskConfig, {"name": name, **common}, "eval") for name in tasks.split(",")]
    built = build(wanted, seed)
    folder = out or Path("runs") / "eval" / _short(model)
    with log.counting(console, "measuring") as progress:

        def advance(what: str, done: int, total: int) -> None:
            progress(done, total)

        if endpoint is not None:
            with remote_of(model, endpoint, key_env, remote, cache=folder / "answers") as speaker:
                measured = baseline.measure(speaker, built, seed, folder, advance)
                console.print(str(speaker.usage))
        else:
            loaded = load(model, arithmetic(dtype, where), where)
            settings = {"model": model, "weights": storage.fingerprint(model)}
            measured = measure(loaded, built, seed, folder, settings=settings, progress=advance)
    found = [row for task, runs in measured.values() for row in rows(task, runs, seed)]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in found], indent=2))
        return
    console.print(table_of(found))
    console.print(f"predictions per item: {folder}")


def _options(data: Path | None, images: Path | None, layout: str | None) -> dict[str, Any]:
    """Task options that name the user's file."""
    if data is None:
        return {}
    form = {} if layout is None else {"format": layout}
    return {"data": {"name": str(data), "images": images and str(images), "options": form}}


def _short(model: str) -> str:
    """A name that tells models apart: `demo-sft` of runs/demo/sft/model, `org-name` of a hub name."""
    return "-".join(part.strip("/") for part in Path(model).parts[-3:] if part not in ("runs", "model", "/", ".", ".."))
