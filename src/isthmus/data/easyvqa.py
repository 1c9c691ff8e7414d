"""easy-VQA: one coloured shape per picture, yes/no and open questions, 13 answers, with its official split.

Source: vzhou842/easy-VQA. Five hundredths of its training pictures, chosen by hash, are our validation split.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from isthmus import assets, packages
from isthmus.types import ConfigError, Image, Sample, Turn

SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")
KINDS = ("yesno", "open", "caption")
CAPTION = "What is in the picture?"


@dataclass(frozen=True)
class Asked:
    question: str
    answer: str
    image: int

    @property
    def kind(self) -> str:
        return "yesno" if self.answer in YES_NO else "open"


@cache
def answers() -> tuple[str, ...]:
    """All answers of the data set, in its own order."""
    return tuple(assets.locate(packages.EASY_VQA, "easy_vqa/data/answers.txt").read_text(encoding="utf-8").split())


@cache
def asked(split: str) -> tuple[Asked, ...]:
    """The questions of a split, in the file's order.

    Raises:
        ConfigError: easy-VQA has no such split.
    """
    if split not in {"train", "val", "test"}:
        raise ConfigError(f"easy-vqa has no split {split!r}", "use train, val or test")
    path = assets.locate(packages.EASY_VQA, f"easy_vqa/data/{_folder(split)}/questions.json")
    rows = [Asked(*row) for row in json.loads(path.read_text(encoding="utf-8"))]
    return tuple(row for row in rows if split == "test" or _held_out(row.image) == (split == "val"))


def samples(split: str, kinds: tuple[str, ...]) -> list[Sample]:
    """One sample per question of these kinds; `caption` is put together from the open answers about a picture."""
    questions = [sample(split, row, index) for index, row in enumerate(asked(split)) if row.kind in kinds]
    return questions + (captions(split) if "caption" in kinds else [])


def conversations(split: str, kinds: tuple[str, ...]) -> list[Sample]:
    """One sample per picture, in which all its questions follow each other."""
    groups: dict[int, list[Asked]] = {}
    for row in asked(split):
        if row.kind in kinds:
            groups.setdefault(row.image, []).append(row)
    return [_conversation(split, image, rows) for image, rows in groups.items()]


def sample(split: str, row: Asked, index: int) -> Sample:
    """One question as a sample."""
    turns = (
        Turn.say("user", Image(picture(split, row.image)), row.question),
        Turn.say("assistant", row.answer),
    )
    meta = {"kind": row.kind, "choices": answers(), "answer": row.answer, "cluster": _cluster(split, row.image)}
    return Sample(turns, f"easy-vqa/{split}/{index}", meta)


def captions(split: str) -> list[Sample]:
    """`a blue triangle`, for every picture whose open questions tell both its colour and its shape."""
    told: dict[int, tuple[str, str]] = {}
    seen: dict[int, set[str]] = {}
    for row in asked(split):
        if row.kind == "open":
            seen.setdefault(row.image, set()).update(row.question.rstrip("?").split(), [row.answer])
    colours = set(answers()) - set(SHAPES) - set(YES_NO)
    for image, words in seen.items():
        colour, shape = words & colours, words & set(SHAPES)
        if colour and shape:
            told[image] = (min(colour), min(shape))
    return [_caption(split, image, f"a {colour} {shape}") for image, (colour, shape) in told.items()]


def _caption(split: str, image: int, answer: str) -> Sample:
    turns = (Turn.say("user", Image(picture(split, image)), CAPTION), Turn.say("assistant", answer))
    meta = {"kind": "caption", "choices": (), "answer": answer, "cluster": _cluster(split, image)}
    return Sample(turns, f"easy-vqa/{split}/caption/{image}", meta)


def _conversation(split: str, image: int, rows: list[Asked]) -> Sample:
    turns: list[Turn] = []
    for row in rows:
        shown = () if turns else (Image(picture(split, image)),)
        turns += [Turn.say("user", *shown, row.question), Turn.say("assistant", row.answer)]
    meta = {"kind": "conversation", "cluster": _cluster(split, image)}
    return Sample(tuple(turns), f"easy-vqa/{split}/image/{image}", meta)


def picture(split: str, image: int) -> Path:
    """The file of a picture."""
    folder = packages.EASY_VQA.folder / "easy_vqa" / "data" / _folder(split) / "images"
    return folder / PurePosixPath(f"{image}.png")


def _folder(split: str) -> str:
    return "test" if split == "test" else "train"


def _cluster(split: str, image: int) -> str:
    return f"easy-vqa/{_folder(split)}/{image}"


def _held_out(image: int) -> bool:
    return int(hashlib.sha256(f"easy-vqa {image}".encode()).hexdigest(), 16) % 20 == 0
