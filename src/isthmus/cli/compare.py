"""`isthmus compare`: several joints under one budget, several seeds each, one table and one page."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cli.options import AsJson, Device

if TYPE_CHECKING:
    from isthmus.config import TaskConfig


class EngineName(StrEnum):
    """Who does the runs."""

    local = "local"
    ray = "ray"


Names = Annotated[
    list[str] | None,
    typer.Argument(
        help="Recipes by name (see `isthmus recipes`) or .yaml file; none goes on with those planned in --out."
    ),
]
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder of the comparison.")]
Added = Annotated[list[str] | None, typer.Option("--add", help="One more recipe for the comparison in --out.")]
Where = Annotated[
    EngineName, typer.Option("--engine", help="Runs in processes of this machine, or of a cluster of Ray.")
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="A dotted override for all recipes: encoder=./mine.")]
Sized = Annotated[
    list[str] | None,
    typer.Option("--size", help="By which field a recipe comes to --parameters: flamingo=aligner.options.inner."),
]
SETTINGS = ("budget", "seeds", "grid", "share", "search", "parameters", "tasks", "limit", "data", "overrides")
"""Options that say what is compared and how; the others say where the work is done and what is shown."""


def compare(
    context: typer.Context,
    recipes: Names = None,
    out: Folder = Path("runs/compare/joints"),
    budget: Annotated[
        str, typer.Option(help="Of each run, shared by its stages: 10m, 2e15flops, 50k-samples, 300-steps.")
    ] = "10m",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each recipe; five, if you want a verdict.")] = 3,
    baseline: Annotated[
        str | None, typer.Option(help="What all others are compared with; else the first. It can be changed later.")
    ] = None,
    grid: Annotated[
        str, typer.Option(help="Factors of the learning rates that are tried for each recipe.")
    ] = "1/3,1,3",
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Of the budget, for each trial of rates.")] = 0.2,
    search: Annotated[bool, typer.Option("--search/--no-search", help="Try learning rates first.")] = True,
    parameters: Annotated[
        str | None, typer.Option(help="That every recipe trains, by LoRA's rank or --size: 6M, or a recipe's name.")
    ] = None,
    size: Sized = None,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated tasks for all recipes; else the baseline's.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A .json or .jsonl file in place of the data of all language-model stages."),
    ] = None,
    overrides: Sets = None,
    add: Added = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, in processes that share a machine's cores.")] = 1,
    engine: Where = EngineName.local,
    publish: Annotated[Path | None, typer.Option(help="Write the result as Markdown, too.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare joints on equal terms: same data, budget and evaluation, several seeds, intervals and verdicts.

    The same command goes on after an interruption, and repeats nothing; with more recipes or seeds it extends.
    """
    from rich.console import Console

    from isthmus.cli.options import on, recipe_of
    from isthmus.comparing.compare import compare as carry_out
    from isthmus.comparing.sizing import chosen
    from isthmus.comparing.table import markdown, tables
    from isthmus.config import Source

    if not recipes:
        _refuse_settings(context)
    console = Console(stderr=as_json, highlight=False)
    try:
        outcome = carry_out(
            [recipe_of(name, None) for name in recipes or []],
            add=[recipe_of(name, None) for name in add or []],
            out=out,
            budget=budget,
            seeds=seeds,
            baseline=baseline,
            factors=factors_of(grid) if search else (),
            share=share,
            parameters=parameters,
            sizes=chosen(size or []),
            tasks=None if tasks is None else _tasks(tasks),
            limit=limit,
            data=[Source(name=str(file)) for file in data or []],
            overrides=overrides or [],
            at_once=jobs,
            engine=engine.value,
            device=on(device),
            console=console,
        )
    except KeyboardInterrupt:
        console.print("interrupted; what was done is kept, and the same command goes on from there")
        raise typer.Exit(130) from None
    file = out / "compare.json"
    if publish is not None:
        publish.parent.mkdir(parents=True, exist_ok=True)
        publish.write_text(markdown(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    if as_json:
        typer.echo(file.read_text(encoding="utf-8"))
        return
    for table in tables(outcome):
        console.print(table)
    for sentence in outcome.advice:
        console.print(sentence)
    console.print(f"\nreport   {out / 'compare.html'}\nnumbers  {file}", soft_wrap=True)


def _tasks(names: str) -> list[TaskConfig]:
    """The tasks of these names.

    Raises:
        ConfigError: there is no such task, or it asks about a file, which a name alone does not tell.
    """
    from isthmus.cli.measure import listed
    from isthmus.config import TaskConfig, check
    from isthmus.errors import ConfigError
    from isthmus.evaluation import catalogue

    for name in listed(names):
        catalogue.named(name)
        if name in catalogue.ON_FILES or name in catalogue.ON_TEXTS:
            raise ConfigError(
                f"task {name} asks about a file of yours, which --tasks cannot name",
                "name it under `eval` in the recipe of the baseline, with the file in its `options`",
            )
    return [check(TaskConfig, {"name": name}, "compare") for name in listed(names)]


def _refuse_settings(context: typer.Context) -> None:
    """Settings are those of the stored comparison where no recipe is named.

    Raises:
        ConfigError: one was given.
    """
    from isthmus.errors import ConfigError

    for name in SETTINGS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = {"overrides": "set"}.get(name, name)
            raise ConfigError(
                f"--{option} is told, and no recipe: a comparison goes on as it was begun",
                "name its recipes again to extend it, or leave the option out",
            )


def factors_of(text: str) -> tuple[float, ...]:
    """`1/3,1,3` as numbers.

    Raises:
        ConfigError: something is no number above 0, or more than a float holds.
    """
    from fractions import Fraction

    from isthmus.errors import ConfigError

    try:
        found = tuple(float(Fraction(each.strip())) for each in text.split(","))
    except (ValueError, ArithmeticError):
        found = ()
    if not found or min(found) <= 0:
        raise ConfigError(f"no grid of factors is written {text!r}", "write numbers above 0, such as 1/3,1,3")
    return found
