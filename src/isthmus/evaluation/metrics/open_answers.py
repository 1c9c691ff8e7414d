"""MMMU's rule for questions without options: a number or a phrase, found where a reply gives its answer.

Yue et al. 2024, arXiv 2311.16502, official code MMMU-Benchmark/MMMU (`eval/eval_utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What an answer stands behind."""
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With thousands marked, with an exponent, and plain."""
TRIVIAL = frozenset(":,.!?;'")


def right(reply: str, answers: Iterable[str]) -> bool:
    """Whether a reply holds one of the answers: an equal number to two decimals, or the phrase within a key phrase."""
    truths = [truth for answer in answers for truth in normal(answer)]
    phrases = _phrases(reply)
    said = [each for text in (*phrases, *_numbers(phrases)) for each in normal(text)]
    return any(
        any(isinstance(truth, str) and truth in each for truth in truths) if isinstance(each, str) else each in truths
        for each in said
    )


def normal(text: str) -> list[str | float]:
    """A number to two decimals; else lower case, a single letter with a blank on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
    return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _phrases(reply: str) -> list[str]:
    """Of each line, the shortest end behind a sign, in the last line also behind `=`; else the whole reply."""
    whole = reply.strip().strip(".").lower()
    lines = whole.split("\n")
    found = [_ending(line, (*SIGNS, "=") if line is lines[-1] else SIGNS) for line in lines]
    return [phrase for phrase in found if phrase and phrase not in TRIVIAL] or [whole]


def _ending(line: str, signs: Sequence[str]) -> str:
    found = ""
    for ending in (line.rpartition(sign)[2].strip() for sign in signs if sign in line):
        if not found or len(ending) < len(found):  # an empty one gives way to the next, as in the official code
            found = ending
    return found


def _numbers(phrases: Iterable[str]) -> list[str]:
    return [number for phrase in phrases for form in NUMBERS for number in form.findall(phrase)]
