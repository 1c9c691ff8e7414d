"""Yes/no benchmarks: the rates of POPE, the scores of MME.

Li et al. 2023, arXiv 2305.10355; Fu et al. 2023, arXiv 2306.13394. Official code: RUCAIBox/POPE,
BradyFU/Awesome-Multimodal-Large-Language-Models.

Differs:
    - POPE's code takes a reply for a no where no, No or not is a word of its first sentence (`Yes, there is no doubt`),
      and for a yes otherwise: also an empty one, `maybe`, and `NO!`. Here what is neither is wrong, and not yes.
    - MME's code looks for yes, then for no, in a reply's first four characters, whatever word they belong to (`Nobody`
      is a no), and a reply that holds neither there is wrong (`There is not`). Here both are whole words, anywhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MME = {
    "perception": {
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    },
    "cognition": {"commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"},
}
"""MME's sub-tasks by group: at most 2000 and 800."""


FIRST = re.compile(r"[\W_]*(yes|no)\b(?!\s*(?:/|and\b|or\b)\s*(?:yes|no)\b)")
"""Either word where a reply begins with it, unless it is `yes or no`."""


def judgement(reply: str) -> bool | None:
    """Yes (True), no (False), or None; a reply's first word, else the one of both that it holds anywhere."""
    text = unicodedata.normalize("NFKC", reply).lower()
    if first := FIRST.match(text):
        return first.group(1) == "yes"
    words = set(re.findall(r"[a-z]+", text))
    said = {"yes": "yes" in words, "no": bool(words & {"no", "not"})}
    return None if said["yes"] == said["no"] else said["yes"]


@dataclass(frozen=True)
class Rates:
    """What POPE reports; `yes` is the positive class. A reply that is neither counts as wrong, and as not yes."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes: float
    """Share of replies that say yes."""


def pope(replies: Sequence[bool | None], truths: Sequence[bool]) -> Rates:
    """Rates of one of POPE's settings (random, popular or adversarial absent objects).

    Raises:
        ValueError: there is nothing to count, or the two differ in length.
    """
    if not truths or len(replies) != len(truths):
        raise ValueError(f"{len(replies)} replies to {len(truths)} questions")
    pairs = list(zip(replies, truths))
    hits = sum(reply is True and truth for reply, truth in pairs)
    said, there = sum(reply is True for reply in replies), sum(truths)
    precision, recall = _share(hits, said), _share(hits, there)
    return Rates(
        accuracy=sum(reply is truth for reply, truth in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=_share(2 * precision * recall, precision + recall),
        yes=said / len(pairs),
    )


def mme(pictures: Iterable[Sequence[bool]]) -> float:
    """Score of one sub-task, at most 200: per cent of right answers, plus per cent of pictures with both right.

    Args:
        pictures: for each picture, whether its two questions were answered rightly.

    Raises:
        ValueError: a picture has not two questions.
    """
    pairs = [tuple(pair) for pair in pictures]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError("MME asks two questions about each picture")
    right = sum(sum(pair) for pair in pairs) / (2 * len(pairs))
    both = sum(all(pair) for pair in pairs) / len(pairs)
    return 100 * (right + both)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
