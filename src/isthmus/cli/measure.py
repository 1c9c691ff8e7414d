"""`isthmus eval`: tasks with controls and intervals, predictions kept per item."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cli.options import AsJson, Device, DType, Endpoint, KeyEnv, Settings, pairs, short_name

if TYPE_CHECKING:
    from isthmus.config import TaskConfig
    from isthmus.evaluation.measure import Measured
    from isthmus.evaluation.results import Generation, Runs
    from isthmus.evaluation.tasks import Task

Folder = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of predictions.  \\[default: runs/eval/RUN-STAGE]")
]
SHOWN = 3
"""Questions that are printed with their replies."""
TASKS = "naming,easy-vqa,presence,counting,relation"


def evaluate(
    model: Annotated[str, typer.Argument(help="A directory that `isthmus train` wrote, or a hub name.")],
    tasks: Annotated[
        str | None, typer.Option(help=f"Comma-separated task names.  \\[default: {TASKS}; none with --text]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task.  \\[default: 500; all of --data]")] = None,
    controls: Annotated[str, typer.Option(help="Baselines beside each task, or none.")] = "blind,shuffled",
    data: Annotated[
        Path | None, typer.Option(help="Your own file; --tasks then says how it is scored: exact, vqa, yes-no, …")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Where the file's picture paths start from.")] = None,
    layout: Annotated[str | None, typer.Option("--format", help="Its layout.  \\[default: told from it]")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="How it is read or asked, such as beside=annotations.json circular=true."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="What alignment cost the LLM: on a text, multiple choice in JSONL, or python-docs (Python's)."
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Demonstrations before each question.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per forward, of a model that runs here.  \\[default: 16]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws items, demonstrations and the exchange of pictures.")] = 0,
    out: Folder = None,
    golden: Annotated[
        Path | None,
        typer.Option(help="A folder that --out wrote: name the items answered otherwise; exit code 1 if any is."),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    endpoint: Endpoint = None,
    key_env: KeyEnv = None,
    remote: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: every task beside its blind and shuffled-picture baselines, with intervals."""

    from rich.console import Console

    from isthmus import storage
    from isthmus.assembly import load
    from isthmus.cli.options import on, remote_of
    from isthmus.cli.train import show_replies
    from isthmus.config import TaskConfig, check
    from isthmus.errors import ConfigError, IsthmusError
    from isthmus.evaluation import baseline, catalogue
    from isthmus.evaluation import golden as kept
    from isthmus.evaluation.controls import CONTROLS
    from isthmus.evaluation.measure import build, check_exchanges, measure, measure_alone, merge
    from isthmus.evaluation.report import cost_table, table_of
    from isthmus.evaluation.results import as_plain, rows
    from isthmus.evaluation.score import BATCH
    from isthmus.training import log
    from isthmus.training.machine import arithmetic

    console = Console(stderr=as_json, highlight=False)
    where = on(device)
    chosen = [] if controls == "none" else listed(controls)
    if strange := [name for name in chosen if name not in CONTROLS]:
        raise ConfigError(
            f"no control is called {strange[0]!r}", f"--controls is some of {','.join(CONTROLS)}, or none"
        )
    asked = _options(data, images, layout, settings) | ({} if shots is None else {"shots": shots})
    common = {"limit": limit, "controls": chosen, "options": asked}
    named = listed(tasks or ("" if text else TASKS))
    for name in named:
        catalogue.check_options(name, asked)
    wanted = [check(TaskConfig, {"name": name, **common}, "eval") for name in named]
    built = build(wanted, seed)
    check_exchanges(built)
    told = build(_on_text(text or [], limit), seed)
    if told and endpoint is not None:
        raise ConfigError("--text reads log-probabilities of raw text; an endpoint gives replies", "leave --text away")
    if batch_size is not None and endpoint is not None:
        raise ConfigError("an endpoint makes batches of its own", "leave --batch-size away")
    folder = out or Path("runs") / "eval" / short_name(model)
    if golden is not None and golden.resolve() == folder.resolve():
        raise ConfigError(f"{folder} is to be written and compared with", "name another folder with --out")
    with log.counting(console, "measuring") as progress:

        def advance(what: str, done: int, total: int) -> None:
            progress(done, total)

        if endpoint is not None:
            with remote_of(model, endpoint, key_env, remote, cache=folder / "answers") as speaker:
                measured = baseline.measure(speaker, built, seed, folder, advance)
                console.print(str(speaker.usage))
        else:
            loaded = load(model, arithmetic(dtype, where), where)
            state = {"model": model, "weights": storage.fingerprint(model)}
            how: dict[str, Any] = {"progress": advance, "batch_size": batch_size or BATCH}
            measured = measure(loaded, [*built, *told], seed, folder, settings=state, **how)
            if told:
                measured |= merge(measure_alone(loaded, told, seed, folder, **how), _of(measured, told))
    found = [row for task, runs in measured.values() for row in rows(task, runs, seed)]
    if not as_json:
        texts = {task.name for task, _ in told}
        if built:
            console.print(table_of([row for row in found if row.task not in texts]))
        show_replies(console, _replies([measured[task.name] for task, _ in built]))
        if told:
            console.print(cost_table([row for row in found if row.task in texts]))
        console.print(f"predictions per item: {folder}")
    changes = [] if golden is None else kept.compare(measured, golden)
    if as_json:
        said = {"rows": found, "golden": changes} if golden else found
        typer.echo(json.dumps(as_plain(said), indent=2, allow_nan=False))
    elif golden is not None:
        console.print(kept.table(changes))
    if count := sum(one.differing for one in changes):
        raise IsthmusError(f"{count} items are asked or answered otherwise than in {golden}", f"compare with {folder}")


def _replies(measured: Sequence[tuple[Task, Runs]]) -> list[Generation]:
    """The first questions of every task with what was answered, in turns, so that a score can be understood."""
    from itertools import chain, zip_longest

    from isthmus.evaluation.results import Generation

    each = [
        [
            Generation(item.words, told.prediction, reference=told.answer)
            for item, told in zip(task.items[:SHOWN], runs.get("after", ()))
            if told.prediction is not None
        ]
        for task, runs in measured
    ]
    turns = chain.from_iterable(zip_longest(*each))
    return [said for said in turns if said is not None][:SHOWN]


def listed(names: str) -> list[str]:
    """`one, two` as names."""
    return [name for each in names.split(",") if (name := each.strip())]


def _options(data: Path | None, images: Path | None, layout: str | None, settings: list[str] | None) -> dict[str, Any]:
    """Task options that name the user's file; a setting is one of how it is read, or else one of the task's own."""
    from isthmus.data.formats import FileOptions

    given = pairs(settings)
    form = {key: value for key, value in given.items() if key in FileOptions.model_fields}
    form |= {} if layout is None else {"format": layout}
    own = {key: value for key, value in given.items() if key not in form}
    if data is None:
        return form | own
    return {"data": {"name": str(data), "images": images and str(images), "options": form}, **own}


def _on_text(texts: list[str], limit: int | None) -> list[TaskConfig]:
    from isthmus.config import TaskConfig
    from isthmus.evaluation.text import named_for

    return [
        TaskConfig(name=name, limit=limit, controls=(), options={"text": text})
        for text in texts
        for name in named_for(text)
    ]


def _of(measured: Measured, built: Sequence[tuple[Task, TaskConfig]]) -> Measured:
    return {task.name: measured[task.name] for task, _ in built}
