"""VQA accuracy over ten people's answers, with the normalisation of its official evaluation.

Antol et al. 2015, arXiv 1505.00468; Goyal et al. 2017, arXiv 1612.00837. Official code: GT-Vision-Lab/VQA.

Differs:
    - Replies and people's answers are always normalised alike. The official code does so only where people differ, and
      compares letter by letter where all agree (`Yes` is wrong where ten people said `yes`). An earlier version of it
      normalises every reply, but takes no more than punctuation from people's answers, and that only where they differ:
      who answers `two` or `the dog` as people did is wrong there.
    - An answer of articles or punctuation alone stays as it is; the official code makes nothing of it, which an empty
      reply equals.
    - Contractions are restored from a list of ordinary ones.
    - TextVQA's own code (M4C's) always normalises both, too; beforehand it deletes `,` and `?`, which else part two
      letters between which they stand, and parts `'s` from its word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TABLE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's i'm "
    "i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't she'd "
    "she's should've shouldn't somebody's someone's something's that'd that's there'd there're there's they'd they'll "
    "they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll "
    "who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
CONTRACTIONS = {word.replace("'", ""): word for word in _TABLE.split()}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ENOUGH = 3
"""As many people with the same answer make it wholly right."""


def normalise(answer: str) -> str:
    """Lower case; punctuation and articles gone, unless nothing else is there; number words as digits; apostrophes of
    contractions restored.
    """
    whole = " ".join(answer.lower().split())
    words = _without_punctuation(whole).split() or whole.split()
    words = [word for word in words if word not in ARTICLES] or words
    return " ".join(CONTRACTIONS.get(word, word) for word in (NUMBERS.get(word, word) for word in words))


def _without_punctuation(text: str) -> str:
    # a mark that touches a blank was set between words; elsewhere it joins two ("red/blue"), unless it parts digits
    digits = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if touches or digits else " ")
    return re.sub(r"\.(?!\d)", "", bare)


def accuracy(answer: str, people: Sequence[str]) -> float:
    """In [0, 1]: the mean over people, each left out in turn, of min(1, others who said the same / 3).

    Raises:
        ValueError: nobody answered.
    """
    if not people:
        raise ValueError("VQA accuracy needs at least one person's answer")
    said, truths = normalise(answer), [normalise(each) for each in people]
    same = truths.count(said)
    left_out = (same - (truth == said) for truth in truths)
    return sum(min(1.0, others / ENOUGH) for others in left_out) / len(truths)
