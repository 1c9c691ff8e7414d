"""`isthmus torture`: does this machine keep what training has done, whatever happens to it?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.options import AsJson

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _torture() -> None:
    """Keeps `train` a verb of its own although it is the only one."""


@app.command()
def train(
    times: Annotated[int, typer.Option(min=1, help="Kills.")] = 200,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that train together and die together.")] = 1,
    seed: Annotated[int, typer.Option(help="When the kills come.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the runs.  \\[default: a temporary one]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Kill training at random moments, saves among them, resume it, and compare with a run that was left alone.

    Every loss, weight and moment must be equal bit for bit. Two hundred kills take a few minutes; what has failed
    is kept in the folder, which is a temporary one unless it is named.
    """
    import shutil
    import tempfile
    from dataclasses import asdict

    from rich.console import Console

    from isthmus.training.log import counting
    from isthmus.training.torture import torture

    console = Console(stderr=as_json, highlight=False)
    folder = out or Path(tempfile.mkdtemp(prefix="isthmus-torture-"))
    with counting(console, "kills") as tell:
        found = torture(times, folder, seed, tell, ranks)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        console.print(
            f"{found.survived}/{found.kills} kills survived, {found.in_saves} of them inside a save; "
            f"{found.runs - len(found.faults)}/{found.runs} runs ended bit-equal to the one that was left alone"
        )
    for fault in found.faults:
        console.print(fault, soft_wrap=True, markup=False)
    if found.faults:
        raise typer.Exit(1)
    if out is None:
        shutil.rmtree(folder)
