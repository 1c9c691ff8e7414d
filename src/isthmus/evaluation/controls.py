"""Baselines that show whether the picture was used: blanked pictures, and pictures exchanged between items.

Both change samples before they are rendered, so that the model's path is the same as in the real run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from PIL import Image as Pillow

from isthmus.data.media import content_key, open_image
from isthmus.data.scenes import Scene
from isthmus.types import KIND, Audio, DataError, Image, Part, Sample, Source, Video

GREY = 128


@dataclass(frozen=True)
class Blank:
    """A mean-grey picture, drawn when needed."""

    width: int
    height: int

    @property
    def key(self) -> str:
        return f"blank-{self.width}x{self.height}-{GREY}"

    def draw(self) -> Pillow.Image:
        return Pillow.new("RGB", (self.width, self.height), (GREY, GREY, GREY))


def blind(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Every picture replaced by a mean-grey one of the same size. The seed is not used."""
    return [_with_pictures(sample, [Image(Blank(*_size(p.source))) for p in _pictures(sample)]) for sample in samples]


def shuffled(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Pictures exchanged among samples with equally many, so that none keeps its last one or one equal to it.

    The last one is what is asked about; those before it are demonstrations' or the conversation's, and move with it.
    Where samples with so many cannot exchange them, the last one alone is taken from a sample with another number.

    Raises:
        DataError: more than half of them show the same picture, and no others have another one.
    """
    found = list(samples)
    dice = random.Random(seed)
    shown = {index: own for index, sample in enumerate(samples) if (own := _pictures(sample))}
    keys = {index: key(own[-1]) for index, own in shown.items()}
    for count in sorted({len(own) for own in shown.values()}):
        members = [index for index, own in shown.items() if len(own) == count]
        others = {keys[index]: own[-1] for index, own in shown.items() if len(own) != count}
        last = [keys[index] for index in members]
        if _exchangeable(last) or not all(set(others) - {own} for own in last):
            given = [shown[members[place]] for place in derangement(last, seed)]
        else:
            strange = [dice.choice([picture for other, picture in others.items() if other != own]) for own in last]
            given = [[*shown[index][:-1], picture] for index, picture in zip(members, strange)]
        for index, pictures in zip(members, given):
            found[index] = _with_pictures(samples[index], pictures)
    return found


CONTROLS: dict[str, Callable[[Sequence[Sample], int], list[Sample]]] = {"blind": blind, "shuffled": shuffled}


def _exchangeable(keys: Sequence[Hashable]) -> bool:
    """Whether no key has more than half of the places."""
    return 2 * max(Counter(keys).values()) <= len(keys)


def derangement(keys: Sequence[Hashable], seed: int) -> list[int]:
    """A permutation p with keys[p[i]] != keys[i] for all i.

    Equal keys stand in one block of a seeded order; turning the order by the longest block's length leaves none in
    its own block.

    Raises:
        DataError: one key has more than half of the places, so that there is no such permutation.
    """
    dice = random.Random(seed)
    blocks: dict[Hashable, list[int]] = {}
    for index, own in enumerate(keys):
        blocks.setdefault(own, []).append(index)
    order = list(blocks.values())
    dice.shuffle(order)
    for block in order:
        dice.shuffle(block)
    turn = max(len(block) for block in order)
    if not _exchangeable(keys):
        raise DataError(
            f"{turn} of {len(keys)} items show the same picture: they cannot be exchanged",
            "leave out the shuffled control for this task (--controls blind), or evaluate more items",
        )
    line = [index for block in order for index in block]
    partner = dict(zip(line, line[turn:] + line[:turn]))
    return [partner[index] for index in range(len(keys))]


def key(part: Part) -> Hashable:
    """What makes a part of a turn the same as another: its text, or its medium's content."""
    if not isinstance(part, Image | Video | Audio):
        return part
    shown = [part.span] if isinstance(part, Video) and part.span is not None else []
    return (KIND[type(part)], content_key(part.source), *shown)


def _size(source: Source) -> tuple[int, int]:
    """Width and height; scenes are not drawn for it."""
    return (source.size, source.size) if isinstance(source, Scene) else open_image(source).size


def _pictures(sample: Sample) -> list[Image]:
    return [medium for medium in sample.media if isinstance(medium, Image)]


def _with_pictures(sample: Sample, pictures: Sequence[Image]) -> Sample:
    """The sample with its pictures replaced in order of appearance."""
    fresh = iter(pictures)
    turns = tuple(
        replace(turn, parts=tuple(next(fresh) if isinstance(part, Image) else part for part in turn.parts))
        for turn in sample.turns
    )
    return sample.but(turns=turns)
