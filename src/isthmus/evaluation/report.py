"""The report of a run, beside the model: `report.json`, one self-contained `report.html`, and a table for the terminal.

What it says is a `Report` (in `results`); the page is laid out in `page`, its figures in `drawing`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text as RichText

from isthmus.evaluation import page
from isthmus.evaluation.results import (
    COLUMNS,
    Column,
    Credit,
    Curve,
    Example,
    Generation,
    Part,
    Report,
    Row,
    examples,
    headline,
    interval,
    rows,
)
from isthmus.evaluation.statistics import Estimate, short
from isthmus.files import write_text

__all__ = [
    "Credit",
    "Curve",
    "Example",
    "Generation",
    "Part",
    "Report",
    "Row",
    "examples",
    "rows",
    "table",
    "write",
]


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into the folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "report.json", folder / "report.html"
    texts = json.dumps(report.plain(), indent=2, ensure_ascii=False, allow_nan=False), page.render(report)
    for path, text in zip(paths, texts):
        write_text(path, text)
    return paths


def table(report: Report) -> Table:
    """A report's results for the terminal."""
    result = table_of(report.rows)
    result.title, result.title_justify = report.title, "left"
    return result


def table_of(rows: Sequence[Row]) -> Table:
    """Result rows for the terminal, every number with its interval."""
    shown = [column for column in COLUMNS if any(column in row.cells for row in rows)]
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    result.add_column("task")
    for column in shown:
        result.add_column(column, justify="right", style="bold" if column == "after" else "", min_width=8)
    result.add_column("chance", justify="right", style="dim")
    for row in rows:
        cells = [_terminal_cell(row.cells.get(column)) for column in shown]
        task = RichText(row.label).append(f"\n{row.n:,} items", style="dim")
        if row.fewest < row.n:
            task.append(f"\n(baselines {row.fewest:,})", style="dim")
        result.add_row(task, *cells, "" if row.chance is None else short(row.chance))
        for name, values in row.besides.items():
            told = (_terminal_figure(values, column) for column in shown)
            result.add_row(RichText(f"  {name}", style="dim"), *told, "")
    return result


def cost_table(rows: Sequence[Row]) -> Table:
    """What alignment changed in the LLM: rows whose `before` is the LLM alone, and the paired difference."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    result.add_column("text")
    for name in ("LLM alone", "aligned", "difference"):
        result.add_column(name, justify="right", min_width=10)
    for row in rows:
        what = RichText(row.label).append(f"\n{row.n:,} items; {_better(row)} is better", style="dim")
        values = row.cells["before"], row.cells["after"], row.gains["before"]
        result.add_row(what, *(_terminal_cell(value) for value in values))
        for name, figures in row.besides.items():
            told = (_terminal_figure(figures, column) for column in ("before", "after"))
            result.add_row(RichText(f"  {name}", style="dim"), *told, "")
    return result


def _better(row: Row) -> str:
    return "higher" if row.unit == "accuracy" else "lower"


def _terminal_figure(values: Mapping[Column, Estimate | None], column: Column) -> RichText:
    if column not in values:
        return RichText()
    value = values[column]
    return RichText("not scored", style="yellow") if value is None else _terminal_cell(value)


def _terminal_cell(value: Estimate | None) -> RichText:
    if value is None:
        return RichText("·", style="dim")
    text = RichText(headline(value))
    text.append(f"\n{interval(value)}", style="dim not bold")
    if value.unscored:
        text.append(f"\n{value.unscored} not scored", style="yellow not bold")
    return text
