"""`isthmus gap`: how far pictures are from their words inside a model, or inside two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.options import AsJson, Device, DType, FileSettings, Images, pairs, short_name

Folder = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of gap.html and gap.json.  \\[default: runs/gap]")
]


def gap(
    model: Annotated[str, typer.Argument(help="A directory that `isthmus train` wrote, or a hub name.")],
    other: Annotated[str | None, typer.Argument(help="A second model, drawn beside the first.")] = None,
    data: Annotated[str, typer.Option(help="naming, scenes, easy-vqa, or your own file.")] = "naming",
    images: Images = None,
    settings: FileSettings = None,
    count: Annotated[int, typer.Option(min=8, help="Pictures that distances and effects are over.")] = 64,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures that are drawn token by token.")] = 4,
    cells: Annotated[int, typer.Option(min=2, help="Rows and columns of places that are hidden.")] = 6,
    out: Folder = None,
    device: Device = "auto",
    dtype: DType = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the gap between pictures and words, layer by layer: distance, likeness, words per token, attention."""
    from rich.console import Console

    from isthmus import storage
    from isthmus.assembly import load
    from isthmus.cli.options import on
    from isthmus.evaluation.gap import page, report, states
    from isthmus.training.machine import arithmetic

    console, where = Console(stderr=as_json, highlight=False), on(device)
    sources = [source for source in (model, other) if source is not None]
    for source in sources:
        states.check_saved(source)
    asked = states.pairs(data, count, None if images is None else str(images), pairs(settings))
    gaps = []
    for name, source in _named(sources).items():
        console.print(f"[bold]{name}[/bold]: {source}")
        loaded = load(source, arithmetic(dtype, where), where)
        say = lambda what: console.print(f"  {what}")  # noqa: E731
        stamp = storage.fingerprint(source)
        gaps.append(
            report.measure(loaded, name, data, asked, fingerprint=stamp, pictures=pictures, cells=cells, progress=say)
        )
        del loaded
    files = report.write(gaps, page.render(gaps), page.pictures(gaps), out or Path("runs") / "gap")
    if as_json:
        typer.echo(json.dumps([each.plain() for each in gaps]))
        return
    console.print(_table(gaps))
    console.print(f"page    {files[1]}\nnumbers {files[0]}")


def _named(sources: list[str]) -> dict[str, str]:
    """A short name per model, `demo-sft` of runs/demo/sft/model; two of one name are told apart by letters."""
    names = list(map(short_name, sources))
    if len(set(names)) < len(names):
        names = [f"{name} {letter}" for name, letter in zip(names, "AB")]
    return dict(zip(names, sources))


def _table(gaps: list) -> object:
    """The first, middle and last layer of each model for the terminal."""
    from rich import box
    from rich.table import Table

    from isthmus.evaluation.gap.report import chosen_layers

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("model", "layer", "distance", "CKA", "neighbours", "attention", "place of the word"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for each in gaps:
        for number in chosen_layers(len(each.layers)):
            layer = each.layers[number]
            values = (layer.gap, layer.cka, layer.neighbours, layer.mass, layer.rank)
            cells = ("·" if value is None else f"{value:.3g}" for value in values)
            table.add_row(each.model, str(number) if number else "input", *cells)
    return table
