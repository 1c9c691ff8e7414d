"""easy-VQA: one coloured shape per picture, yes/no and open questions, 13 answers, with its official split.

Source: vzhou842/easy-VQA. A twentieth of its training pictures, chosen by hash, are our validation split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from isthmus import assets
from isthmus.assets import packages
from isthmus.types import ConfigError, Image, Sample, Turn

SHAPES = frozenset({"circle", "rectangle", "triangle"})
YES_NO = frozenset({"yes", "no"})
CAPTION = "What is in the picture?"


class Asked(NamedTuple):
    """A question about a picture."""

    question: str
    answer: str
    image: int
    kind: str


@dataclass(frozen=True)
class EasyVQA:
    """A split as samples: each asks the questions of one group, which are about one picture."""

    split: str
    groups: Sequence[tuple[Asked, ...]]
    answers: tuple[str, ...]
    images: Path

    def sample(self, index: int) -> Sample:
        rows = self.groups[index]
        first = rows[0]
        picture = Image(self.images / f"{first.image}.png")
        turns, *branches = [
            (Turn.say("user", picture, row.question), Turn.say("assistant", row.answer)) for row in rows
        ]
        meta: dict[str, Any] = {"kind": "several", "cluster": f"easy-vqa/{_folder(self.split)}/{first.image}"}
        if len(rows) == 1:
            choices = () if first.kind == "caption" else self.answers
            meta |= {"kind": first.kind, "choices": choices, "answer": first.answer}
        return Sample(turns, f"easy-vqa/{self.split}/{first.image}/{index}", meta, branches=tuple(branches))


def read(split: str, kinds: Sequence[str], together: bool) -> EasyVQA:
    """The questions of some kinds (`yesno`, `open`, `caption`), one a sample, or all about a picture in one.

    Raises:
        ConfigError: easy-VQA has no such split.
    """
    if split not in {"train", "val", "test"}:
        raise ConfigError(f"easy-vqa has no split {split!r}", "use train, val or test")
    answers = tuple(assets.locate(packages.EASY_VQA, "easy_vqa/data/answers.txt").read_text(encoding="utf-8").split())
    rows = [row for row in _rows(split) if row.kind in kinds]
    if "caption" in kinds:
        rows += _captions((row for row in _rows(split) if row.kind == "open"), set(answers) - SHAPES - YES_NO)
    groups = _by_picture(rows) if together else [(row,) for row in rows]
    images = packages.EASY_VQA.folder / "easy_vqa" / "data" / _folder(split) / "images"
    return EasyVQA(split, groups, answers, images)


@cache
def _rows(split: str) -> tuple[Asked, ...]:
    """A split's questions in the file's order."""
    path = assets.locate(packages.EASY_VQA, f"easy_vqa/data/{_folder(split)}/questions.json")
    rows = [
        Asked(question, answer, image, "yesno" if answer in YES_NO else "open")
        for question, answer, image in json.loads(path.read_text(encoding="utf-8"))
    ]
    return tuple(row for row in rows if split == "test" or _held_out(row.image) == (split == "val"))


def _captions(rows: Iterable[Asked], colours: set[str]) -> Iterator[Asked]:
    """`a blue triangle`, for every picture whose open questions and answers tell both its colour and its shape."""
    told: dict[int, set[str]] = {}
    for row in rows:
        told.setdefault(row.image, set()).update([row.answer, *row.question.rstrip("?").split()])
    for image, words in told.items():
        colour, shape = words & colours, words & SHAPES
        if colour and shape:
            yield Asked(CAPTION, f"a {min(colour)} {min(shape)}", image, "caption")


def _by_picture(rows: Iterable[Asked]) -> list[tuple[Asked, ...]]:
    pictures: dict[int, list[Asked]] = {}
    for row in rows:
        pictures.setdefault(row.image, []).append(row)
    return [tuple(asked) for asked in pictures.values()]


def _folder(split: str) -> str:
    return "test" if split == "test" else "train"


@cache
def _held_out(image: int) -> bool:
    return int(hashlib.sha256(f"easy-vqa {image}".encode()).hexdigest(), 16) % 20 == 0
