"""Multiple choice as MMBench, ScienceQA, SEED-Bench and MMMU ask it: options by letter, and circular evaluation.

MMBench: Liu et al. 2023, arXiv 2307.06281, official code open-compass/VLMEvalKit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

from isthmus.evaluation.answers import normalise

NO_ARTICLE = re.compile(r"(?<![A-Za-z'])A(?![A-Za-z']| [a-z])|(?<=[^.!?\s] )A(?![A-Za-z'])")
"""An A that no word in small letters follows, or that stands within a sentence."""


def listed(options: Sequence[str]) -> str:
    """`A. cat`, `B. dog`, ... one a line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options))


def chosen(reply: str, options: Sequence[str]) -> int | None:
    """The place of the option that a reply names, by letter or in words; None where it names none, or several.

    A letter counts where it stands alone: `B`, `(B)`, `B.`, `The answer is B`, `It is B`. A capital A that begins a
    sentence with a word in small letters behind it may be an article, and does not count by itself; nor does one that
    an option follows (`Answer: A dog`).
    """
    text = reply.strip()
    letters = ascii_uppercase[: len(options)]
    words = "|".join(re.escape(name) for option in options if (name := normalise(option)))
    article = rf"A (?i:{words or '(?!)'})\b"
    if len(text) == 1 and text.upper() in letters:
        return letters.index(text.upper())
    for pattern in (
        rf"(?i:answer|option|choice)\s*(?:is)?\s*:?\s*\(?(?!{article})([{letters}])\b",
        rf"\(([{letters}])\)",
        rf"^([{letters}])[.):]",
    ):
        if found := {match.group(1) for match in re.finditer(pattern, text, re.MULTILINE)}:
            return letters.index(found.pop()) if len(found) == 1 else None
    said = f" {normalise(text)} "
    named = [place for place, option in enumerate(options) if normalise(option) and f" {normalise(option)} " in said]
    # "red car" names "car" as well: what is part of another option that was named does not count
    named = [place for place in named if not any(place != other and _within(options, place, other) for other in named)]
    if named:
        return named[0] if len(named) == 1 else None
    alone = set(re.findall(rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])", text))
    if len(alone) != 1 or (alone == {"A"} and not NO_ARTICLE.search(text)):
        return None
    return letters.index(alone.pop())


def _within(options: Sequence[str], inner: int, outer: int) -> bool:
    return normalise(options[inner]) != normalise(options[outer]) and (
        f" {normalise(options[inner])} " in f" {normalise(options[outer])} "
    )


def rotations(options: Sequence[str]) -> list[tuple[str, ...]]:
    """The options as often as there are options, each time moved by one place."""
    return [tuple(options[shift:]) + tuple(options[:shift]) for shift in range(len(options))]


def circular(rounds: Iterable[Iterable[bool]]) -> float:
    """Share of questions that were answered rightly under every rotation of their options.

    Raises:
        ValueError: there is no question.
    """
    right = [all(answers) for answers in rounds]
    if not right:
        raise ValueError("circular evaluation needs at least one question")
    return sum(right) / len(right)
