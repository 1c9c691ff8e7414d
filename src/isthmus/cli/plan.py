"""`isthmus plan`: what a recipe trains, what a picture costs it, and what training takes, before weights are read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cli.options import AsJson, Device, Overrides

if TYPE_CHECKING:
    from rich.table import Table

    from isthmus.cost_table import Row
    from isthmus.forecast import Forecast, StageForecast

Name = Annotated[
    str | None, typer.Argument(help="A recipe's name (see `isthmus recipes`), or a .yaml or .json file; or --all.")
]


def plan(
    recipe: Name = None,
    overrides: Overrides = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Another recipe, in one table of stages with the first; again for more.")
    ] = None,
    steps: Annotated[
        bool, typer.Option(help="Trace a step of each stage: tokens, operations, memory, and time on this machine.")
    ] = True,
    seconds: Annotated[float, typer.Option(min=0, help="Of calibration per stage; 0 leaves times out.")] = 1.0,
    every: Annotated[bool, typer.Option("--all", help="A table of all recipes, in place of one.")] = False,
    write: Annotated[bool, typer.Option("--write", help="With --all, rewrite docs/costs.md; in a checkout.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Parameters, what trains, what a picture costs, and what training takes, before any weights are read."""
    from isthmus import cost_table, recipes
    from isthmus.cli.options import on, recipe_of
    from isthmus.costs import costs
    from isthmus.errors import ConfigError
    from isthmus.forecast import forecast
    from isthmus.papers import rewrite
    from isthmus.planning import plan as plan_of

    if (recipe is None) != every or (write and not every):
        raise ConfigError("plan takes one recipe, or --all (with --write)", "`isthmus recipes` lists the recipes")
    if write:
        typer.echo(f"wrote {rewrite('costs.md', cost_table.page)}")
    elif recipe is None:
        _show_all([cost_table.row(name) for name in recipes.BOOK], as_json)
    elif beside:
        chosen = [recipe_of(name, overrides) for name in (recipe, *beside)]
        _show_stages([forecast(each, on(device), seconds) for each in chosen], as_json)
    else:
        one = recipe_of(recipe, overrides)
        row = cost_table.Row(plan_of(one), costs(one))
        _show_one(row, forecast(one, on(device), seconds) if steps else None, as_json)


def _show_all(rows: list[Row], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from isthmus.cost_table import TITLES

    if as_json:
        typer.echo(json.dumps({row.plan.recipe: row.plain() for row in rows}, indent=2))
        return
    table = Table(*TITLES, box=None)
    for row in rows:
        table.add_row(*(cell.replace("<br>", "\n").strip("`") for cell in row.cells()))
    Console(highlight=False).print(table)
    typer.echo("operations in GFLOP, cache in MiB per picture; docs/costs.md says what is counted")


def _show_one(row: Row, ahead: Forecast | None, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    if as_json:
        training = {} if ahead is None else {"training": ahead.plain()}
        typer.echo(json.dumps(row.plain() | training, indent=2))
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
        f"prefill of one picture and {cost.text} text tokens: {_flop(cost.total)} (encoder {_flop(cost.encoder)}, "
        f"connector {_flop(cost.joint)}, LLM {_flop(cost.llm)}; {_flop(cost.text_only)} without the picture)"
    )
    console.print(f"kept per picture: {_bytes(cost.cache)} of keys and values, {_bytes(cost.aside)} aside, in bfloat16")
    if ahead is not None and ahead.stages:
        console.print()
        console.print(_training(ahead))
        console.print(_footnote([ahead]))


# ---------------------------------------------------------------------------------------------- training


def _training(ahead: Forecast) -> Table:
    """One recipe's stages as columns: what a step has, computes, holds and takes."""
    from rich.table import Table

    table = Table("training", *(stage.name for stage in ahead.stages), box=None)

    def line(title: str, cells: list[str]) -> None:
        table.add_row(title, *cells)

    stages = ahead.stages
    line("tokens per sample", [_tokens(stage) for stage in stages])
    line("FLOP per step", [_flop(stage.flops) for stage in stages])
    table.add_section()
    for kind in stages[0].memory:
        line(f"{kind}, memory", [_bytes(stage.memory[kind]) for stage in stages])
    line("peak memory", [_bytes(stage.peak) for stage in stages])
    table.add_section()
    for kind in stages[0].seconds or ():
        line(f"{kind}, ms per step", [_milliseconds((stage.seconds or {})[kind]) for stage in stages])
    line("steps", ["?" if stage.steps is None else f"{stage.steps:,}" for stage in stages])
    line("time of the stage", [_clock(stage.stage_seconds) for stage in stages])
    return table


def _show_stages(forecasts: list[Forecast], as_json: bool) -> None:
    """Recipes side by side: a line per stage."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps([each.plain() for each in forecasts], indent=2))
        return
    titles = ("recipe", "stage", "trained", "tokens per sample", "FLOP/step", "peak memory", "ms/step", "steps", "time")
    table = Table(*titles, box=None)
    for each in forecasts:
        for number, stage in enumerate(each.stages):
            table.add_row(
                "" if number else each.recipe,
                stage.name,
                f"{stage.trained:,}",
                _tokens(stage),
                _flop(stage.flops),
                _bytes(stage.peak),
                "–" if stage.step_seconds is None else f"{1e3 * stage.step_seconds:,.3g}",
                "?" if stage.steps is None else f"{stage.steps:,}",
                _clock(stage.stage_seconds),
            )
    console = Console(highlight=False)
    console.print(table)
    console.print(_footnote(forecasts))


def _tokens(stage: StageForecast) -> str:
    return f"{stage.sample['tokens']:.0f}, {stage.sample['learnt']:.0f} learnt" + " (assumed)" * stage.assumed


def _footnote(forecasts: list[Forecast]) -> str:
    first = forecasts[0]
    text = f"on {first.device} in {first.dtype}, {first.threads} threads; docs/plan.md says what is counted"
    if any(stage.assumed for each in forecasts for stage in each.stages):
        text += "; assumed: the data are not here, so samples of one picture and 64 text tokens"
    return text


def _flop(value: float) -> str:
    return _amount(value, 1000, "FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


def _bytes(value: float) -> str:
    return _amount(value, 1024, "B", "KiB", "MiB", "GiB", "TiB")


def _amount(value: float, each: int, *units: str) -> str:
    """Three digits, in the unit that fits."""
    while value >= 999.5 and len(units) > 1:
        value, units = value / each, units[1:]
    return f"{value:.3g} {units[0]}" if value < 999.5 else f"{value:,.0f} {units[0]}"


def _milliseconds(seconds: float) -> str:
    """Three digits, or whole milliseconds."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:,.3g} h"
