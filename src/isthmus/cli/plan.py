"""`isthmus plan`: what a recipe trains, what a picture costs it, and what training takes, before weights are read."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.cli.options import AsJson, Device

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from isthmus.config import Recipe
    from isthmus.cost_table import Row
    from isthmus.forecast import Forecast, StageForecast

Name = Annotated[
    str | None, typer.Argument(help="A recipe's name (see `isthmus recipes`), or a .yaml or .json file; or --all.")
]
More = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE | KEY=VALUE]...",
        help="Further recipes, beside the first; and dotted overrides of all of them, such as "
        "stages.sft.lr=1e-3 encoder=./my-encoder seed=1.",
    ),
]
SHORT = {"gradients": "grads", "optimizer": "optim.", "activations": "activ.", "features": "feats."}
"""What kinds of memory are called where ten columns have 80 characters."""
WIDTH = 100
"""Columns of a file or a pipe, which the widest table takes; a terminal has its own."""


def plan(
    recipe: Name = None,
    more: More = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="Another recipe, as if named behind the first; again for more.")
    ] = None,
    steps: Annotated[
        bool, typer.Option(help="Trace a step of each stage: tokens, operations, memory, and time on this machine.")
    ] = True,
    seconds: Annotated[float, typer.Option(min=0, help="Of calibration per stage; 0 leaves times out.")] = 1.0,
    every: Annotated[bool, typer.Option("--all", help="A table of all recipes, in place of some.")] = False,
    write: Annotated[bool, typer.Option("--write", help="With --all, rewrite docs/costs.md; in a checkout.")] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Parameters, what trains, what a picture costs, and what training takes, before any weights are read."""
    from isthmus import cost_table, recipes
    from isthmus.cli.options import on, recipe_of
    from isthmus.errors import ConfigError
    from isthmus.papers import rewrite

    told = [each for each in more or [] if "=" in each]
    names = [*([recipe] if recipe else []), *_further(more or []), *(beside or [])]
    if bool(names) == every or (write and not every):
        raise ConfigError(
            "plan takes one recipe or several, or --all (with --write)", "`isthmus recipes` lists the recipes"
        )
    if write:
        typer.echo(f"wrote {rewrite('costs.md', cost_table.page)}")
    elif every:
        _show_all([cost_table.row(name) for name in recipes.BOOK], as_json)
    else:
        chosen = [recipe_of(name, told) for name in names]
        found = [_planned(each, on(device), seconds, steps) for each in chosen]
        plain = [each.plain() for each in found]
        if as_json:
            typer.echo(json.dumps(plain[0] if len(plain) == 1 else plain, indent=2))
        elif len(found) == 1:
            _show_one(found[0])
        else:
            _show_several(found)


def _further(words: list[str]) -> list[str]:
    """The recipes among what stands behind the first one.

    Raises:
        ConfigError: a word is neither a recipe nor an override.
    """
    from isthmus import recipes
    from isthmus.cli.options import is_folder
    from isthmus.config import FILES
    from isthmus.errors import ConfigError, nearest

    names = [word for word in words if "=" not in word]
    for name in names:
        if name not in recipes.BOOK and not name.endswith(FILES) and not is_folder(name):
            raise ConfigError(
                f"{name!r} is no recipe, and no override without '='{nearest(name, list(recipes.BOOK))}",
                "`isthmus recipes` lists the recipes; an override is key=value, e.g. seed=1",
            )
    return names


@dataclass(frozen=True)
class Planned:
    """One recipe: what it has and costs, and what its training takes."""

    row: Row
    ahead: Forecast | None = None
    untraced: str | None = None
    """Why its steps are not forecast, where that was asked for."""

    def plain(self) -> dict[str, Any]:
        if self.untraced is not None:
            return self.row.plain() | {"training": None, "untraced": self.untraced}
        return self.row.plain() | ({} if self.ahead is None else {"training": self.ahead.plain()})


def _planned(recipe: Recipe, device: torch.device, seconds: float, steps: bool) -> Planned:
    from isthmus.cost_table import Row
    from isthmus.costs import costs
    from isthmus.forecast import Untraceable, forecast
    from isthmus.planning import plan as plan_of

    row = Row(plan_of(recipe), costs(recipe))
    try:
        return Planned(row, forecast(recipe, device, seconds) if steps else None)
    except Untraceable as error:
        return Planned(row, untraced=f"{error.cause}; {error.remedy}")


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=WIDTH)


def _show_all(rows: list[Row], as_json: bool) -> None:
    from rich.table import Table

    from isthmus.cost_table import TITLES

    if as_json:
        typer.echo(json.dumps({row.plan.recipe: row.plain() for row in rows}, indent=2))
        return
    table = Table(*TITLES, box=None)
    for row in rows:
        table.add_row(*(cell.replace("<br>", "\n").strip("`") for cell in row.cells()))
    _console().print(table)
    typer.echo("operations in GFLOP, cache in MiB per picture; docs/costs.md says what is counted")


def _show_one(found: Planned) -> None:
    from rich.table import Table

    planned, cost, ahead = found.row.plan, found.row.costs, found.ahead
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
    console = _console()
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
    if found.untraced is not None:
        typer.echo(f"no forecast: {found.untraced}")


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


# ---------------------------------------------------------------------------------------------- side by side


def _show_several(found: list[Planned]) -> None:
    """Recipes side by side, a line per stage: what they have and cost, what training takes, and its memory by kind."""
    console = _console()
    console.print(_structures([each.row for each in found]))
    text = found[0].row.costs.text
    console.print(f"prefill: of one picture and {text} text tokens; kept: per picture, in bfloat16")
    forecasts = [each.ahead for each in found if each.ahead is not None]
    if any(each.stages for each in forecasts):
        for table in (_steps(forecasts), _memory(forecasts)):
            console.print()
            console.print(table)
        console.print(_footnote(forecasts))
    for each in found:
        if each.untraced is not None:
            typer.echo(f"no forecast: {each.untraced}")


def _structures(rows: list[Row]) -> Table:
    """Parameters, and what a picture costs."""
    from rich.table import Table

    from isthmus.cost_table import amount

    table = Table("recipe", "parameters", "tokens", "prefill", "kept", "stage", "trained", box=None)
    for row in rows:
        planned, cost = row.plan, row.costs
        tokens = ", ".join(map(str, planned.tokens.values()))
        cells = [planned.recipe, amount(planned.total), tokens, _flop(cost.total), _bytes(cost.kept)]
        if not planned.stages:
            table.add_row(*cells)
        for stage in planned.stages:
            table.add_row(*cells, stage.name, f"{stage.trained:,} ({stage.trained / planned.total:.1%})")
            cells = [""] * len(cells)
    return table


def _steps(forecasts: list[Forecast]) -> Table:
    from rich.table import Table

    table = Table("recipe", "stage", "tokens per sample", "FLOP/step", "ms/step", "steps", "time", box=None)
    for each in forecasts:
        for number, stage in enumerate(each.stages):
            table.add_row(
                "" if number else each.recipe,
                stage.name,
                _tokens(stage),
                _flop(stage.flops),
                "–" if stage.step_seconds is None else f"{1e3 * stage.step_seconds:,.3g}",
                "?" if stage.steps is None else f"{stage.steps:,}",
                _clock(stage.stage_seconds),
            )
    return table


def _memory(forecasts: list[Forecast]) -> Table:
    """By kind, in one unit; recipes have lines of their own, so that ten columns find room."""
    from rich.table import Table

    kinds = next(stage.memory for each in forecasts for stage in each.stages)
    table = Table("memory, MiB", box=None, padding=(0, 1, 0, 0))
    for title in (*kinds, "peak"):
        table.add_column(SHORT.get(title, title), justify="right")
    for each in forecasts:
        table.add_row(each.recipe)
        for stage in each.stages:
            table.add_row(
                f"  {stage.name}", *(_mebibytes(stage.memory[kind]) for kind in kinds), _mebibytes(stage.peak)
            )
    return table


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


def _mebibytes(value: int) -> str:
    """Three digits, or whole ones."""
    return f"{value / 2**20:,.0f}" if value >= 100 << 20 else f"{value / 2**20:.3g}"


def _milliseconds(seconds: float) -> str:
    """Three digits, or whole milliseconds."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5400 else f"{seconds / 3600:,.3g} h"
