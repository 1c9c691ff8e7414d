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
from typing import TypeAlias

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


Counted: TypeAlias = list[tuple[int, bool]]
"""What a rate is a share of: the questions that count, by place, and whether each counts for it; of none it is 0."""


def pope(replies: Sequence[bool | None], truths: Sequence[bool]) -> dict[str, Counted]:
    """POPE's rates; yes is the positive class. A reply that is neither counts as wrong, and as not yes.

    F1 is 2 hits / (said yes + is yes), so the share of hits among all that was said together with all that is. `yes` is
    the share of replies that say it.

    Raises:
        ValueError: the two differ in length.
    """
    pairs = list(enumerate(zip(replies, truths, strict=True)))
    said = [(place, truth) for place, (reply, truth) in pairs if reply is True]
    there = [(place, reply is True) for place, (reply, truth) in pairs if truth]
    return {
        "accuracy": [(place, reply is truth) for place, (reply, truth) in pairs],
        "precision": said,
        "recall": there,
        "f1": said + there,
        "yes": [(place, reply is True) for place, (reply, _) in pairs],
    }


def mme(pictures: Iterable[Sequence[bool]]) -> list[float]:
    """Each picture's part of its sub-task's score, which is their mean: at most 200.

    The score is per cent of right answers, plus per cent of pictures with both right.

    Args:
        pictures: for each picture, whether its two questions were answered rightly.

    Raises:
        ValueError: a picture has not two questions.
    """
    pairs = [tuple(pair) for pair in pictures]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("MME asks two questions about each picture")
    return [100 * (sum(pair) / 2 + all(pair)) for pair in pairs]
