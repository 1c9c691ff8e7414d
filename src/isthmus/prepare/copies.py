"""Samples that nearly repeat an earlier one: pictures by perceptual hash, texts by MinHash.

pHash: the signs of a picture's low cosine frequencies (Zauner 2010). MinHash: Broder 1997, with banding as in locality
sensitive hashing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image as Pillow

from isthmus.data.instructions import FIELD, WORDINGS
from isthmus.data.media import open_image
from isthmus.types import Box, Image, Part, Sample, Text

BITS = 3
"""Hashes of pictures that differ in so few of their 64 bits are one picture; found by a quarter that is equal."""
SHINGLE = 5
"""Words of a sequence that texts are compared by."""
PERMUTATIONS, BANDS = 128, 32
LIKE = 0.7
"""Texts that share so much of their sequences (Jaccard) are one text."""
PRIME = (1 << 31) - 1


class Copies(ABC):
    """1 where a sample has been there before, else 0: among those before it, or among those it is held `against`."""

    learns = True
    """Samples are kept in mind, to be known again."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(self._one(sample)) for sample in samples]

    def against(self, samples: Iterable[Sample]) -> None:
        """Look among these from now on, and no more among what came before."""
        for sample in samples:
            self._one(sample)
        self.learns = False

    @abstractmethod
    def _one(self, sample: Sample) -> bool: ...


class SamePicture(Copies):
    """By pictures: all of them have been there before, or one of them is in what the sample is held against."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], list[int]] = {}

    def _one(self, sample: Sample) -> bool:
        pictures = [medium for medium in sample.media if isinstance(medium, Image)]
        known = [self._known(perceptual(open_image(picture.source))) for picture in pictures]
        return bool(known) and (all if self.learns else any)(known)

    def _known(self, bits: int) -> bool:
        quarters = [(place, bits >> 16 * place & 0xFFFF) for place in range(4)]
        near = any((bits ^ other).bit_count() <= BITS for quarter in quarters for other in self._seen.get(quarter, ()))
        if self.learns and not near:
            for quarter in quarters:
                self._seen.setdefault(quarter, []).append(bits)
        return near


class SameText(Copies):
    """By what the conversation says, nearly, whatever its pictures."""

    def __init__(self) -> None:
        dice = np.random.default_rng(0)
        self._a, self._b = dice.integers(1, PRIME, (2, PERMUTATIONS, 1), np.uint64)
        self._seen: dict[Hashable, list[np.ndarray]] = {}

    def signature(self, text: str) -> np.ndarray:
        """The least value of every permutation over the text's sequences, [P]."""
        hashes = np.array(sorted(set(map(_hash, _shingles(text)))), np.uint64)
        return ((self._a * hashes + self._b) % np.uint64(PRIME)).min(axis=1)

    def _one(self, sample: Sample) -> bool:
        signature = self.signature(conversation(sample))
        bands = [(place, band.tobytes()) for place, band in enumerate(signature.reshape(BANDS, -1))]
        near = any((signature == other).mean() >= LIKE for band in bands for other in self._seen.get(band, ()))
        if self.learns and not near:
            for band in bands:
                self._seen.setdefault(band, []).append(signature)
        return near


def conversation(sample: Sample) -> str:
    """What is said, regions as their labels and corners, without the wording of a request: the sample's id drew it."""
    kind = str(sample.meta.get("kind", ""))
    texts = ("".join(map(_spelled, turn.parts)) for turn in sample.turns)
    return "\n".join(_bare(text, kind) if turn.role == "user" else text for turn, text in zip(sample.turns, texts))


def _spelled(part: Part) -> str:
    if isinstance(part, Box):
        return f" {part.label} {' '.join(f'{corner:.2f}' for corner in part.xyxy)} "
    return part.text if isinstance(part, Text) else ""


def _bare(asked: str, task: str) -> str:
    """A request without the fixed words of the task's wording, of those that fit the one with the most."""
    every = ([piece.strip() for piece in FIELD.split(wording)[::2]] for wording in WORDINGS.get(task, ()))
    fitting = [fixed for fixed in every if all(piece in asked for piece in fixed)]
    for piece in max(fitting, key=lambda fixed: sum(map(len, fixed)), default=[]):
        asked = asked.replace(piece, " ", 1)
    return asked


def perceptual(picture: Pillow.Image) -> int:
    """64 bits that hardly change when a picture is scaled, compressed or brightened."""
    grey = np.asarray(picture.convert("L").resize((32, 32), Pillow.Resampling.LANCZOS), np.float64)
    low = (COSINES @ grey @ COSINES.T).ravel()
    return int("".join("1" if value > np.median(low[1:]) else "0" for value in low), 2)


def _cosines() -> np.ndarray:
    """The first eight rows of the cosine transform of 32 values."""
    frequency, place = np.ogrid[:8, :32]
    return np.cos(np.pi * frequency * (2 * place + 1) / 64)


COSINES = _cosines()


def _shingles(text: str) -> Iterator[str]:
    said = text.lower().split()
    return (" ".join(said[start : start + SHINGLE]) for start in range(max(1, len(said) - SHINGLE + 1)))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=4).digest()) % PRIME
