"""`isthmus parity`: whether two forms of a model (saved, exported, served) are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.options import AsJson, KeyEnv

Form = Annotated[str, typer.Argument(help="A directory of ours or of transformers, or http://HOST:PORT/v1.")]


def parity(
    one: Form,
    other: Form,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="The picture that both are shown.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What both are asked.")] = "What is in the picture?",
    name: Annotated[str | None, typer.Option(help="What an endpoint calls the model.")] = None,
    key_env: KeyEnv = None,
    as_json: AsJson = False,
) -> None:
    """Compare two forms of a model: prepared picture, token ids, logits, greedy answer. Exit code 1 if not equal."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from isthmus import parity
    from isthmus.data.media import open_image
    from isthmus.types import Image

    question = parity.Question(prompt, None if image is None else Image(open_image(image)))
    checks = parity.compare(parity.form(one, name, key_env), parity.form(other, name, key_env), question)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in checks], indent=1))
    else:
        table = Table("", "", "", box=None, show_header=False)
        for each in checks:
            table.add_row(each.what, _WORDS[each.equal], each.note)
        Console(highlight=False).print(table)
    if not parity.equal(checks):
        raise typer.Exit(1)


_WORDS = {True: "[green]equal[/green]", False: "[red]differs[/red]", None: "[dim]not compared[/dim]"}
