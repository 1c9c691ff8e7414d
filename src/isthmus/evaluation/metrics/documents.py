"""Questions about documents and charts: DocVQA's ANLS, and ChartQA's relaxed accuracy.

ANLS: Biten et al. 2019, arXiv 1905.13648 (scene text); Mathew et al. 2020, arXiv 2007.00398 (DocVQA). Official code:
that of the Robust Reading Competition.
Relaxed accuracy: Masry et al. 2022, arXiv 2203.10244 (ChartQA), after Methani et al. 2019, arXiv 1909.00997 (PlotQA).

A similarity of exactly a half counts, and lengths are those before blanks are evened out, as in the competition's
script; the papers' formula and the PyPI package `anls` drop a half.

Differs: `inf` and `nan` are words, not numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST = 0.5
"""A similarity below counts as a wrong answer, not as a misread one."""
TOLERANCE = 0.05
"""How far a number may be off, as a share of the true one."""


def anls(reply: str, answers: Sequence[str]) -> float:
    """In [0, 1]: how alike the reply is to the nearest answer, letter by letter; case and further blanks do not count.

    Raises:
        ValueError: there is no answer.
    """
    best = max(_similarity(reply, answer) for answer in answers)
    return best if best >= LEAST else 0.0


def relaxed(reply: str, answer: str) -> bool:
    """Whether two numbers differ by at most 5 % of the true one, or two texts by nothing but case; 5% is 0.05."""
    said, true = _number(reply), _number(answer)
    if said is None or not true:  # of nothing, no share can be told
        return reply.strip().lower() == answer.strip().lower()
    return abs(said - true) <= TOLERANCE * abs(true)


def _even(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    return 1 - _edits(_even(one), _even(other)) / max(len(one), len(other), 1)


def _edits(one: str, other: str) -> int:
    """Levenshtein's distance: the fewest letters to insert, leave out or replace."""
    row = list(range(len(other) + 1))
    for place, letter in enumerate(one, 1):
        above, row = row, [place]
        for column, found in enumerate(other):
            row.append(min(row[-1] + 1, above[column + 1] + 1, above[column] + (letter != found)))
    return row[-1]


def _number(text: str) -> float | None:
    bare = text.strip()
    try:
        number = float(bare.removesuffix("%")) / (100 if bare.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
