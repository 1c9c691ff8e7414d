"""What was answered to each item, right, wrong or not scored, and the JSON-lines file in which it is kept.

The first line of a file is its header: task, control, rule, settings and a fingerprint of all that the answers
depend on. A file is written whole and renamed, so that a reader finds a complete one or none.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isthmus.data import boxes
from isthmus.files import write_text
from isthmus.types import KIND, Box, DataError, Grounding, Part, Sample, Tag, Text

SCORING = 1
"""Raised whenever replies come to be scored otherwise under the same rule: files from before are not reused."""
CALIBRATED = "no name favoured"
"""What reports call the figure of `calibrated`."""
CALIBRATED_RULE = f"{CALIBRATED}: each score less the mean of the same name's over the other items"


@dataclass(frozen=True)
class Prediction:
    """One item: what was asked, what was answered, and whether it was right (None: not scored)."""

    id: str
    task: str
    control: str | None
    prompt: str
    choices: tuple[str, ...]
    scores: tuple[float, ...]
    """Natural-log probability of each choice, or the cosine; for a reference answer, that of the answer alone."""
    prediction: str | None
    answer: str
    right: float | None
    """True or False, or how right it is from 0 to 1; None: not scored."""
    cluster: str
    kind: str = ""
    tokens: int = 0
    """Tokens that the last score sums over, where the score is turned into NLL per token."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Header:
    """The first line of a predictions file."""

    task: str
    control: str | None
    rule: str
    fingerprint: str
    items: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    scoring: int = SCORING


def write(path: Path, header: Header, predictions: Sequence[Prediction]) -> None:
    """Write header and predictions, one JSON object a line, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_line(asdict(header)), *(_line(asdict(prediction)) for prediction in predictions)]
    write_text(path, "".join(lines))


def read(path: Path) -> tuple[Header, list[Prediction]]:
    """Read a predictions file.

    Raises:
        DataError: unreadable, not JSON lines, a field is unknown, or lines are missing.
    """
    try:
        first, *rest = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
        header = Header(**{"scoring": 0, **first})
        predictions = [Prediction(**{**row, **_tuples(row)}) for row in rest]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a predictions file ({error})", "remove it and evaluate again") from None
    if len(predictions) != header.items:
        raise DataError(
            f"{path}: {len(predictions)} predictions of {header.items}", "remove the file and evaluate again"
        )
    return header, predictions


def reusable(path: Path, fingerprint: str) -> list[Prediction] | None:
    """The predictions in `path` if it is complete and was made from the same things, else None."""
    if not path.exists():
        return None
    try:
        header, predictions = read(path)
    except DataError:
        return None
    return predictions if (header.fingerprint, header.scoring) == (fingerprint, SCORING) else None


def choose(choices: Sequence[str], scores: Sequence[float], answer: str) -> tuple[str | None, bool | None]:
    """The most likely choice, and whether it is the answer.

    Not scored (None) where a score is not finite, the answer is not among the choices, or it ties for the first place.
    """
    if answer not in choices or not all(math.isfinite(score) for score in scores):
        return None, None
    best = max(scores)
    first = [choice for choice, score in zip(choices, scores) if score == best]
    if len(first) > 1 and answer in first:
        return None, None
    return first[0], first[0] == answer


def calibrated(predictions: Sequence[Prediction]) -> list[float | None] | None:
    """How right each answer would be if no choice were favoured; None where a choice is offered in one item alone.

    From a choice's score its mean over the other items that offer it is taken, and the highest is chosen: what a model
    holds likely whatever it sees is gone, which can only mislead where answers are drawn evenly. No answer is looked
    at, and choices that tie share the item, as all do under a blank picture.

    Source: the idea of Batch Calibration (Zhou et al., arXiv 2309.17249), of which only the abstract was at hand.
    Differs, or may: logarithms are averaged as they are, and an item is left out of its own means.
    """
    offered: defaultdict[str, list[float]] = defaultdict(list)
    for one in predictions:
        for choice, score in zip(one.choices, one.scores):
            offered[choice].append(score)
    if not predictions or any(len(scores) < 2 for scores in offered.values()):
        return None
    sums = {choice: (math.fsum(scores), len(scores) - 1) for choice, scores in offered.items()}
    return [_lifted(one, [sums[choice] for choice in one.choices]) for one in predictions]


def _lifted(one: Prediction, sums: Sequence[tuple[float, int]]) -> float | None:
    """The answer's share of the choices that rise most above their mean of `sums`, this item left out."""
    lifts = [score - (total - score) / others for score, (total, others) in zip(one.scores, sums)]
    if one.answer not in one.choices or not all(map(math.isfinite, lifts)):
        return None
    first = [choice for choice, lift in zip(one.choices, lifts) if math.isclose(lift, max(lifts), abs_tol=1e-9)]
    return (one.answer in first) / len(first)


def verdict(right: float | None) -> str:
    """`right`, `wrong`, `not scored`, or how right: `.60 right`."""
    if right is None:
        return "not scored"
    return {0.0: "wrong", 1.0: "right"}.get(float(right), f"{right:.2f} right".removeprefix("0"))


def match(reply: str | None, answer: str, *, contains: bool = False) -> bool | None:
    """Whether a free reply is the answer after `normalise`, or contains it as whole words.

    Not scored (None) where there is no reply or the answer is empty; an empty reply is wrong.
    """
    truth = normalise(answer)
    if reply is None or not truth:
        return None
    said = normalise(reply)
    return f" {truth} " in f" {said} " if contains else said == truth


def normalise(text: str) -> str:
    """Lower case without accents of Latin letters, punctuation, articles or doubled blanks; `two` becomes `2`.

    Letters, their marks in other scripts, numbers and symbols stay, wide and narrow forms made one (NFKC): `ガラス` is
    not `カラス`, `C++` not `C`, `$5` and `5°` not `5`. So do `%`, a number's minus and point, and the `#` of `C#`.
    Where nothing would be left, punctuation or an article stays: it is what was meant.
    """
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    folded = unicodedata.normalize("NFKC", visible).casefold().translate(_ALIKE)
    whole = "".join(_plain(folded))
    kept = {match.start() for match in _MEANT.finditer(whole)}
    words = "".join(c if place in kept or _worded(c) else " " for place, c in enumerate(whole)).split()
    words = words or whole.split()
    told = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in told)


def _plain(text: str) -> Iterator[str]:
    """Its characters without accents of Latin letters, and without marks that belong to no letter."""
    marked = False
    for char in text:
        category = unicodedata.category(char)
        if category[0] == "M":
            yield char * marked
        else:
            latin = category[0] == "L" and unicodedata.name(char, "").startswith("LATIN")
            marked = category[0] == "L" and not latin
            yield unicodedata.normalize("NFD", char)[0] if latin else char


def _worded(char: str) -> bool:
    """Letters, marks, numbers, symbols other than bare accents, and the percent sign."""
    category = unicodedata.category(char)
    return char == "%" or (category[0] in "LMNS" and category != "Sk")


_ALIKE = str.maketrans("\u2212\u2010\u2013\u2044", "---/")
"""Minus, hyphen, dash and a fraction's stroke, as they are typed."""
_MEANT = re.compile(r"(?<!\w)-(?=[.$£€¥]?\d)|(?<![^\W\d])(?<!\.)\.(?=\d)|(?<=[^\W\d_])#")
"""The minus before a number, unless it joins words, a number's point, and a sharp."""
_ARTICLES = {"a", "an", "the"}
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}


def plain(sample: Sample) -> str:
    """The conversation as text, pictures as `<image>`, one turn a line."""
    return "\n".join(f"{turn.role}: {' '.join(map(_word, turn.parts))}" for turn in sample.turns)


def _word(part: Part) -> str:
    if isinstance(part, Text | Tag):
        return part.text
    if isinstance(part, Box):
        return boxes.Decimals().write([part])
    return "<grounding>" if isinstance(part, Grounding) else f"<{KIND[type(part)]}>"


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _tuples(row: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(row[name]) for name in ("choices", "scores")}
