"""`isthmus plan`: what a recipe trains and what a picture costs it, before any weights are read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cli.options import AsJson, Overrides

if TYPE_CHECKING:
    from isthmus.comparison import Row

Name = Annotated[
    str | None, typer.Argument(help="A recipe's name (see `isthmus recipes`), or a .yaml or .json file; or --all.")
]


def plan(
    recipe: Name = None,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="A table of all recipes, in place of one.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="With --all, rewrite docs/comparison.md; in a checkout.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Parameters by part, what every stage trains, and what a picture costs, before any weights are read."""
    from isthmus import comparison, recipes
    from isthmus.cli.options import recipe_of
    from isthmus.costs import costs
    from isthmus.errors import ConfigError
    from isthmus.papers import rewrite
    from isthmus.planning import plan as plan_of

    if (recipe is None) != every or (write and not every):
        raise ConfigError("plan takes one recipe, or --all (with --write)", "`isthmus recipes` lists the recipes")
    if write:
        typer.echo(f"wrote {rewrite('comparison.md', comparison.page)}")
    elif recipe is None:
        _show_all([comparison.row(name) for name in recipes.BOOK], as_json)
    else:
        chosen = recipe_of(recipe, overrides)
        _show_one(comparison.Row(plan_of(chosen), costs(chosen)), as_json)


def _show_all(rows: list[Row], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from isthmus.comparison import TITLES

    if as_json:
        typer.echo(json.dumps({row.plan.recipe: row.plain() for row in rows}, indent=2))
        return
    table = Table(*TITLES, box=None)
    for row in rows:
        table.add_row(*(cell.replace("<br>", "\n").strip("`") for cell in row.cells()))
    Console(highlight=False).print(table)
    typer.echo("operations in GFLOP, cache in MiB per picture; docs/comparison.md says what is counted")


def _show_one(row: Row, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(row.plain(), indent=2))
        return
    planned, cost = row.plan, row.costs
    table = Table("part", "parameters", *(f"trained in {stage.name}" for stage in planned.stages), box=None)
    for part in dict.fromkeys([*planned.parts, *(part for stage in planned.stages for part in stage.by_part)]):
        table.add_row(
            part,
            f"{planned.parts.get(part, 0):,}" if part in planned.parts else "added",
            *(f"{stage.by_part.get(part, 0):,}" for stage in planned.stages),
        )
    shares = (f"{stage.trained:,} ({stage.trained / planned.total:.1%})" for stage in planned.stages)
    table.add_section()
    table.add_row("all", f"{planned.total:,}", *shares)
    console = Console(highlight=False)
    console.print(table)
    console.print(", ".join(f"{tokens} tokens per {kind}" for kind, tokens in planned.tokens.items()))
    console.print(
        f"prefill of one picture and {cost.text} text tokens: {cost.total / 1e9:,.1f} GFLOP (encoder "
        f"{cost.encoder / 1e9:,.1f}, connector {cost.joint / 1e9:,.1f}, LLM {cost.llm / 1e9:,.1f}; "
        f"{cost.text_only / 1e9:,.1f} without the picture)"
    )
    console.print(
        f"kept per picture: {cost.cache / 2**20:,.2f} MiB of keys and values, {cost.aside / 2**20:,.2f} MiB aside, "
        f"in bfloat16"
    )
