"""Which differences from the baseline deserve a word: better, worse or not decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from isthmus.comparing.outcome import Cell, Line
from isthmus.evaluation import seeds


def judged(mean: Line, lines: Sequence[Line]) -> tuple[Line, tuple[Line, ...]]:
    """The mean and the tasks with verdicts: two families of differences, with 5 % for both together.

    A task that is the mean, because it is the only one, is not tested twice.
    """
    others = [line for line in lines if not line.same(mean)]
    ps = [[cell.gap.p for line in family for cell in line.cells.values() if cell.gap] for family in ([mean], others)]
    first, second = (iter(adjusted) for adjusted in seeds.adjust(ps))
    said = _with(mean, first)
    return said, tuple(replace(line, cells=said.cells) if line.same(mean) else _with(line, second) for line in lines)


def _with(line: Line, adjusted: Iterator[float]) -> Line:
    """A line with the verdicts of its cells, whose p-values come in their order."""
    cells = {
        name: cell if cell.gap is None else _decided(line, cell, next(adjusted)) for name, cell in line.cells.items()
    }
    return replace(line, cells=cells)


def _decided(line: Line, cell: Cell, p: float) -> Cell:
    """No verdict where items were not scored: they could decide it either way."""
    assert cell.gap is not None  # only those are compared
    scored = not any(each.unscored for each in line.cells.values())
    return replace(cell, adjusted=p, verdict=seeds.verdict(cell.gap.value, p, line.higher) if scored else "not decided")
