"""Which descriptions that a model wrote are worth learning from.

MiniGPT-4, Zhu et al. 2023, arXiv 2304.10592; official code: github.com/Vision-CAIR/MiniGPT-4.
Differs: what the authors asked ChatGPT and people to mend, rules find and leave out.
"""

from __future__ import annotations

import re

MOST_REPEATED = 0.3
"""Share of repeated three-word sequences."""
LEAST = 80
"""Words. Below so many tokens, MiniGPT-4's first stage was asked to go on."""
LITTER = re.compile(r"#{2,}|[^\x00-\uffff]{3,}|(\S)\1{5,}")
"""Marks of a prompt, strings of pictograms, one character over and over."""


def curated(description: str) -> str:
    """The rule that a description breaks; nothing if it is good."""
    if len(description.split()) < LEAST:
        return "too short"
    if repeats(description) or LITTER.search(description):
        return "repeats itself"
    if description.rstrip()[-1] not in ".!?\"')":
        return "breaks off"
    return ""


def repeats(text: str) -> bool:
    """Whether a sentence stands there twice, or too many short sequences do."""
    sentences = [one.strip(" .!?").lower() for one in re.split(r"[.!?]\s+", text) if len(one.split()) > 3]
    return len(set(sentences)) < len(sentences) or repeated(text) > MOST_REPEATED


def repeated(text: str) -> float:
    """Share of a text's three-word sequences that were there before."""
    said = text.lower().split()
    triples = list(zip(said, said[1:], said[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0
