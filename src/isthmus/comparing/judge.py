"""Which differences from the baseline deserve a word: better, worse or not decided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from isthmus.comparing.outcome import Cell, Line
from isthmus.evaluation import seeds


def judged(mean: Line, lines: Sequence[Line]) -> tuple[Line, tuple[Line, ...]]:
    """The mean and the tasks with verdicts: two families of differences, with 5 % for both together.

    Where there is one task, the mean is that task and is not tested twice.
    """
    families = [[mean], list(lines) if len(lines) > 1 else []]
    ps = [[cell.gap.p for line in family for cell in line.cells.values() if cell.gap] for family in families]
    first, second = (iter(adjusted) for adjusted in seeds.adjust(ps))
    said = _with(mean, first)
    return said, tuple(_with(line, second) for line in lines) if len(lines) > 1 else tuple(_same(lines, said))


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


def _same(lines: Sequence[Line], mean: Line) -> list[Line]:
    return [replace(line, cells=mean.cells) for line in lines]
