"""Conversations about pictures, made by a language model that reads captions and regions instead of seeing them.

LLaVA, Liu et al. 2023, arXiv 2304.08485; official code: github.com/haotian-liu/LLaVA (three kinds of conversations).
MiniGPT-4, Zhu et al. 2023, arXiv 2304.10592; official code: github.com/Vision-CAIR/MiniGPT-4 (descriptions by a model
that sees the picture, asked to go on where they are short, and curated).

Any speaker will do; one that keeps its answers by request goes on after an interruption without asking again. Replies
that break a rule are left out and counted: those that speak of captions or boxes as the source, hold coordinates or a
marker of pictures, are too short or too long, or repeat themselves.

Differs: the requests are our own words, without seed examples; what was left out is not asked for again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from isthmus.data.instructions import choose
from isthmus.data.writers import marker_in
from isthmus.prepare.curation import LEAST, curated, repeats
from isthmus.types import Box, Image, Sample, Source, Text, Turn

if TYPE_CHECKING:
    from isthmus.speakers import Speaker

Kind: TypeAlias = Literal["conversation", "detail", "reasoning", "description"]
"""What is written; a description by a model that sees the picture."""
BATCH = 16
"""Requests that are sent together."""

_SEES = (
    "You are looking at a picture. What you know of it is written below: sentences about it, and perhaps objects with "
    "their places as [left, top, right, bottom], from 0 to 1. Speak as somebody who sees the picture. Never mention "
    "sentences, captions, boxes, coordinates or this text, and say nothing that does not follow from them."
)
REQUESTS: dict[str, str] = {
    "conversation": (
        f"{_SEES} Write a conversation in which a person asks about what the picture shows (which things, how many, "
        "which colours, what is done, where something is relative to another thing) and an assistant answers. Ask only "
        "what can be answered for certain. Write three questions, each line beginning with `Question:`, and below each "
        "one line beginning with `Answer:`."
    ),
    "detail": f"{_SEES} Describe the picture in full, as one flowing paragraph of 60 to 150 words.",
    "reasoning": (
        f"{_SEES} Write one question that needs thinking beyond what is plainly there (why, what next, what for), in a "
        "line beginning with `Question:`, and its well-grounded answer in a line beginning with `Answer:`."
    ),
}
REQUESTS["description"] = "Describe this picture in full. Leave out nothing that you see."
ON = "Go on."
LENGTHS: dict[str, tuple[int, int]] = {
    "conversation": (1, 120),
    "detail": (40, 250),
    "reasoning": (15, 250),
    "description": (LEAST, 400),
}
"""Words of an answer, at least and at most."""
SOURCE = re.compile(r"\b(captions?|bounding box(es)?|coordinates?|the (given )?(sentences|descriptions?))\b", re.I)
NUMBERS = re.compile(r"\[?\s*[01]?\.\d+\s*,\s*[01]?\.\d+\s*,")
TURN = re.compile(r"^\W*(question|answer)\W*:\W*(.+?)\s*$", re.I | re.M)


@dataclass
class Made:
    """What has come of it so far."""

    samples: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """How many replies broke which rule."""


@dataclass(frozen=True)
class Seen:
    """What is known of a picture: it, sentences about it, and regions with their names."""

    id: str
    picture: Image
    sentences: tuple[str, ...]
    boxes: tuple[Box, ...]

    @property
    def told(self) -> str:
        """As the language model reads it."""
        places = (f"{box.label}: [{', '.join(f'{number:.2f}' for number in box.xyxy)}]" for box in self.boxes)
        return "\n".join((*self.sentences, "", *places)).strip()


def gathered(samples: Iterable[Sample], limit: int | None = None, bare: bool = False) -> list[Seen]:
    """What samples say of each picture: answers as sentences, labelled boxes as regions.

    Pictures keep their order; beyond the first `limit` of which something is said, none is kept. With `bare`, nothing
    need be said of them.
    """
    found: dict[Source, Seen] = {}
    for sample in samples:
        pictures = [medium for medium in sample.media if isinstance(medium, Image)]
        if len(pictures) != 1:
            continue
        answers = [turn for turn in sample.turns if turn.role == "assistant"]
        boxes = tuple(part for turn in answers for part in turn.parts if isinstance(part, Box) and part.label)
        sentences = tuple(turn.text.strip() for turn in answers if _is_sentence(turn))
        source, full = _same(pictures[0].source), limit is not None and len(found) >= limit
        if (sentences or boxes or bare) and (source in found or not full):
            seen = found.get(source, Seen(sample.id, pictures[0], (), ()))
            found[source] = replace(
                seen, sentences=tuple(dict.fromkeys(seen.sentences + sentences)), boxes=seen.boxes + boxes
            )
    return list(found.values())


def make(seen: Iterable[Seen], kinds: Sequence[Kind], speaker: Speaker, made: Made) -> Iterator[Sample]:
    """Conversations of these kinds about each picture, as the speaker writes them; `made` counts."""
    wanted = ((one, kind) for one in seen for kind in kinds)
    while batch := list(islice(wanted, BATCH)):
        for (one, kind), reply in zip(batch, _replies(batch, speaker)):
            said = _exchanges(one, kind, reply)
            wrong = broken(kind, said)
            if wrong:
                made.refused[wrong] += 1
                continue
            made.samples += 1
            yield _sample(one, kind, said)


def broken(kind: Kind, said: Sequence[tuple[str, str]]) -> str:
    """The rule that a reply breaks; nothing if it is good."""
    least, most = LENGTHS[kind]
    rules: dict[str, Callable[[str], bool]] = {
        "speaks of its source": lambda text: bool(SOURCE.search(text)),
        "holds coordinates": lambda text: bool(NUMBERS.search(text)),
        "holds a marker": lambda text: bool(marker_in(text)),
    }
    if not said or len({question for question, _ in said}) < len(said):
        return "not in the form that was asked for"
    for name, breaks in rules.items():
        if any(breaks(text) for exchange in said for text in exchange):
            return name
    if any(not least <= len(answer.split()) <= most for _, answer in said):
        return "too short or too long"
    if any(repeats(answer) for _, answer in said):
        return "repeats itself"
    return curated(said[0][1]) if kind == "description" else ""


def _same(source: Source) -> Source:
    """What is equal for equal pictures, however their paths are spelt."""
    return realpath(source) if isinstance(source, str | Path) else source


def _is_sentence(turn: Turn) -> bool:
    return len(turn.text.split()) > 2 and not any(isinstance(part, Box) for part in turn.parts)


def _replies(batch: Sequence[tuple[Seen, Kind]], speaker: Speaker) -> list[str]:
    """What the speaker writes; it goes on once with a description that is short."""
    asked = [_request(one, kind) for one, kind in batch]
    replies = speaker.say_all(asked)
    short = [
        place
        for place, (_, kind) in enumerate(batch)
        if kind == "description" and 0 < len(replies[place].split()) < LEAST
    ]
    longer = speaker.say_all([_going_on(asked[place], replies[place]) for place in short]) if short else []
    for place, more in zip(short, longer):
        replies[place] = f"{replies[place].strip()} {more.strip()}"
    return replies


def _going_on(asked: Sample, reply: str) -> Sample:
    return asked.but(turns=(*asked.turns, Turn.say("assistant", reply), Turn.say("user", ON)))


def _request(seen: Seen, kind: Kind) -> Sample:
    if kind == "description":
        return Sample((Turn.say("user", seen.picture, REQUESTS[kind]),), f"{seen.id}/{kind}")
    return Sample((Turn.say("system", REQUESTS[kind]), Turn.say("user", seen.told)), f"{seen.id}/{kind}")


def _exchanges(seen: Seen, kind: Kind, reply: str) -> list[tuple[str, str]]:
    """Questions and answers of a reply; none where it has another form."""
    if kind in ("detail", "description"):
        return [(choose("detail", "many", seen.id), reply.strip())]
    found = [(match[1].lower(), match[2]) for match in TURN.finditer(reply)]
    names = [name for name, _ in found]
    if not found or names != ["question", "answer"] * (len(found) // 2):
        return []
    texts = [text for _, text in found]
    return list(zip(texts[::2], texts[1::2]))


def _sample(seen: Seen, kind: Kind, said: Sequence[tuple[str, str]]) -> Sample:
    turns = [turn for question, answer in said for turn in (Turn.say("user", question), Turn.say("assistant", answer))]
    first = Turn("user", (seen.picture, Text("\n"), *turns[0].parts))
    return Sample((first, *turns[1:]), f"{seen.id}/{kind}", {"kind": kind})
