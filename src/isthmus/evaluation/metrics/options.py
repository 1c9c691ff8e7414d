"""Multiple choice as MMBench, ScienceQA, SEED-Bench and MMMU ask it: options by letter, and circular evaluation.

MMBench: Liu et al. 2023, arXiv 2307.06281, official code open-compass/VLMEvalKit.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from string import ascii_uppercase

from isthmus.evaluation.answers import normalise

NO_ARTICLE = re.compile(r"(?<![A-Za-z'])A(?![A-Za-z']| [a-z])|(?<=[^.!?\s] )A(?![A-Za-z'])")
"""An A that no word in small letters follows, or that stands within a sentence."""
MARKS = r"(?:[\s.,:;()\[\]\"'。]|\*\*)"
"""What may stand around a letter that is all that is said."""
END = r"(?![\w+#]|[-'’]\w|\.\w\b)"
"""Behind a letter that is no part of a word, `C++`, `B-52` or `e.g.`."""


def listed(options: Sequence[str]) -> str:
    """`A. cat`, `B. dog`, ... one a line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options))


def chosen(reply: str, options: Sequence[str]) -> int | None:
    """The place of the option that a reply names, by letter or in words; None where it names none, or several.

    A letter counts where it is all that is said, or stands as one: `b`, `(b)`, `b. dog`, `The answer is b`, `It is B`.
    What is called the answer goes before what is called an option. A small `a` with a word behind it is an article. So
    may be a capital one that begins a sentence, which does not count by itself, nor where an option follows (`Answer: A
    dog`).
    """
    text = unicodedata.normalize("NFKC", reply).strip()
    names = [normalise(option) for option in options]
    capitals = ascii_uppercase[: len(options)]
    letter = f"([{capitals}{capitals.lower()}])"
    words = "|".join(re.escape(name) for name in names if name)
    article = rf"A (?i:{words or '(?!)'})(?!\w)|a\s+\w"
    named = rf"\b\s*(?:is)?\s*:?\s*(?:(?:option|choice)\b)?\s*\(?(?-i:(?!{article}){letter}){END}"
    for pattern in (
        rf"\A{MARKS}*{letter}{MARKS}*\Z",
        rf"(?i:answer{named})",
        rf"(?i:(?:option|choice){named})",
        rf"(?<![A-Za-z])\({letter}\)",
        rf"^{letter}[.):](?![a-z]\.)",
    ):
        if found := {match.group(1).upper() for match in re.finditer(pattern, text, re.MULTILINE)}:
            return capitals.index(found.pop()) if len(found) == 1 else None
    said = f" {normalise(text)} "
    spoken = [place for place, name in enumerate(names) if name and f" {name} " in said]
    # "red car" names "car" as well: what is part of another option that was named does not count
    spoken = [one for one in spoken if not any(_within(names[one], names[other]) for other in spoken)]
    if spoken:
        return spoken[0] if len(spoken) == 1 else None
    alone = set(re.findall(rf"(?<![A-Za-z'°])([{capitals}])(?![A-Za-z'])", text))
    if len(alone) != 1 or (alone == {"A"} and not NO_ARTICLE.search(text)):
        return None
    return capitals.index(alone.pop())


def _within(inner: str, outer: str) -> bool:
    return inner != outer and f" {inner} " in f" {outer} "


def rotations(options: Sequence[str]) -> list[tuple[str, ...]]:
    """The options as often as there are options, each time moved by one place."""
    return [tuple(options[shift:]) + tuple(options[:shift]) for shift in range(len(options))]


def circular(rounds: Iterable[Iterable[bool]]) -> list[bool]:
    """Whether each question was answered rightly under every rotation of its options."""
    return [all(answers) for answers in rounds]
