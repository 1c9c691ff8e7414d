"""`isthmus demo` and `train`: from a recipe to a model."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cli.options import AsJson, Device, Out, Overrides, RecipeName

if TYPE_CHECKING:
    from rich.console import Console

    from isthmus.config import Recipe
    from isthmus.evaluation.results import Generation

Minutes = typer.Option(min=0.1, help="Minutes of training over all stages; measured once, then a number of steps.")
FIXED = "4 to 7"
"""Minutes of the demo that are not training, on two cores: encoding pictures, measuring twice, the report."""


def demo(
    minutes: Annotated[float, Minutes] = 4.0,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    out: Out = None,
    device: Device = "auto",
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Align a small LLM with a vision encoder on embedded data, measure before and after, write a report.

    Running it again goes on where it stopped, or shows the finished report. Ctrl-C keeps what was done.
    """
    from rich.console import Console

    from isthmus import assets
    from isthmus.recipes.demo import demo as recipe_for

    console = Console(stderr=as_json, highlight=False)
    if missing := assets.missing("demo"):
        console.print(f"fetching {', '.join(missing)} (about a minute, once)")
        assets.fetch("demo")
    recipe = recipe_for(minutes).but(seed=seed).override(overrides or [])
    folder = out or Path("runs") / "demo"
    if not (folder / "report.json").is_file():
        console.print(
            f"[bold]{recipe.about}[/bold]\n{minutes:g} minutes of training and about {FIXED} around it on two cores, "
            f"into {folder}. Ctrl-C keeps what is done; the same command goes on."
        )
    _experiment(recipe, folder, device, console, as_json)


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    minutes: Annotated[float | None, Minutes] = None,
    out: Out = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train all stages of a recipe, measure where it names tasks, write the report; resumes by itself.

    With --minutes the stages share that time as they share their own; overrides come after it.
    A run's folder in place of a recipe goes on with that run, all that was overridden included.
    """
    from rich.console import Console

    from isthmus.cli.options import is_folder, recipe_of
    from isthmus.recipes.within import within

    chosen = recipe_of(recipe, None)
    if minutes is not None:
        chosen = within(chosen, minutes)
    chosen = chosen.override(overrides or [])
    folder = out or (Path(recipe) if is_folder(recipe) else Path("runs") / chosen.name)
    _experiment(chosen, folder, device, Console(stderr=as_json, highlight=False), as_json)


def _called() -> str:
    """How this program is called here: by its name, or by its path where the name is not found."""
    given = Path(sys.argv[0])
    return str(given) if given.name == "isthmus" and shutil.which("isthmus") is None else "isthmus"


def _experiment(recipe: Recipe, folder: Path, device: str, console: Console, as_json: bool) -> None:
    """Run what is missing, then show the result and what to do next."""
    from isthmus.cli.options import on
    from isthmus.evaluation.answers import verdict
    from isthmus.evaluation.report import table
    from isthmus.experiment import experiment
    from isthmus.training.parallel import World

    last = recipe.last
    world = World.here()
    console.quiet = not world.main
    chosen = on(device)
    try:
        with world.started(chosen):
            result = experiment(recipe, folder, world.device(chosen), console, world)
    except KeyboardInterrupt:
        if world.size > 1 or not (folder / "run.json").is_file():
            raise
        result = None
    if not world.main:
        return
    if result is None:
        console.print("interrupted; what was done is kept, and this goes on from there:")
        console.print(_going_on(folder, device, as_json, world.size), markup=False, soft_wrap=True)
        raise typer.Exit(130)
    if as_json:
        typer.echo(json.dumps(result.plain()))
        return
    if result.rows:
        console.print(table(result))
    else:
        console.print("Nothing was measured: the recipe names no tasks. `isthmus eval` asks a finished model.")
    for example in result.examples:
        state = verdict(example.after.right)
        before = f", before: {example.before.prediction}" if example.before else ""
        console.print(f"{example.question}  [bold]{example.after.prediction}[/bold] ({state}{before})")
    show_replies(console, result.generations)
    model = folder / last.name / "model"
    chat = shlex.join([_called(), "chat", str(model), "--image", "PICTURE.png"])
    after = f"\nreport  {folder / 'report.html'}\nmodel   {model}\nchat    {chat}"
    console.print(after, markup=False, soft_wrap=True)  # to be copied: neither brackets taken out nor lines broken


def _going_on(folder: Path, device: str, as_json: bool, processes: int) -> str:
    """The line that goes on with a run; of several processes each needs what its launcher was told."""
    if processes > 1:
        return f"the same launcher, with: train {shlex.quote(str(folder))}"
    options = ["--device", device] * (device != "auto") + ["--json"] * as_json
    return shlex.join([_called(), "train", str(folder), *options])


def show_replies(console: Console, said: Iterable[Generation]) -> None:
    """A line for each: what was asked, the reply as it came, and the reference."""
    from rich.text import Text

    for each in said:
        asked = " ".join(each.prompt.split())
        told = Text.assemble((asked, "dim"), f"  {each.reply!r} ", (f"(reference: {each.reference})", "dim"))
        console.print(told, soft_wrap=True)
