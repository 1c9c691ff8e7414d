"""Which sample comes when: a pure function of the seed and a step number, so that a resume needs one integer.

Sets are interleaved on a fixed cycle in which each appears in proportion to its weight and as evenly as possible, so
any stretch of draws follows the weights to within a sample or two. Each set is walked in a fresh random permutation
per epoch; the permutation is computed position by position (a Feistel network keyed by seed, set and epoch), so
neither time nor memory depends on how far a run has come or on how large a set is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from itertools import cycle, islice
from typing import Literal, TypeAlias

from isthmus.data.pack import pack
from isthmus.types import ConfigError, DataError

Ref: TypeAlias = tuple[int, int]
"""(number of the set, number of the item in it)."""

Batching: TypeAlias = Literal["bucketed", "shuffled", "packed"]

CYCLE = 4096
"""Draws after which the interleaving repeats; weights are rounded to multiples of 1 / CYCLE, and none to zero."""
ROUNDS = 4


def permuted(position: int, size: int, key: tuple[int, ...]) -> int:
    """Where a random permutation of `range(size)` sends `position`; `key` chooses the permutation.

    A four-round Feistel network over the next power of four, walked until it lands inside the range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keyed = blake2b(repr(key).encode(), digest_size=8)
    while True:
        left, right = position >> half, position & mask
        for turn in range(ROUNDS):
            digest = keyed.copy()
            digest.update(f" {turn} {right}".encode())
            left, right = right, left ^ (int.from_bytes(digest.digest()) & mask)
        position = left << half | right
        if position < size:
            return position


class Mix:
    """An endless stream over several sets: `mix[i]` is the (set, item) of draw i.

    Args:
        sets: anything with a length.
        weights: share of the draws of each set; they need not add up to 1.
        seed: chooses the order within the sets.

    Raises:
        DataError: a set is empty.
        ConfigError: there is no set, or a weight is not positive.
    """

    def __init__(self, sets: Sequence[Sized], weights: Sequence[float], seed: int) -> None:
        if not sets or len(sets) != len(weights) or min(weights) <= 0:
            raise ConfigError("a mix needs sets and a positive weight for each", "name at least one data set")
        for number, items in enumerate(sets):
            if not len(items):
                raise DataError(f"data set {number} of the mix is empty", "raise its limit, or leave it out")
        self.sizes = [len(items) for items in sets]
        self.seed = seed
        counts = _shares(weights, CYCLE if len(sets) > 1 else 1)
        # Draw k of a set that has n draws in the cycle belongs at time (k + 1/2) / n.
        draws = [((k + 0.5) / n, number, k) for number, n in enumerate(counts) for k in range(n)]
        self._cycle = [(number, k) for _, number, k in sorted(draws)]
        self._counts = counts

    @property
    def epoch_length(self) -> int:
        """As many draws as the sets have items together; a set with a large share repeats sooner."""
        return sum(self.sizes)

    @property
    def unrepeated(self) -> Fraction:
        """Draws after which the first of the sets has shown all of its items."""
        return min(Fraction(size * len(self._cycle), count) for size, count in zip(self.sizes, self._counts))

    def __getitem__(self, index: int) -> Ref:
        cycle, place = divmod(index, len(self._cycle))
        number, k = self._cycle[place]
        epoch, position = divmod(cycle * self._counts[number] + k, self.sizes[number])
        return number, permuted(position, self.sizes[number], (self.seed, number, epoch))


@dataclass(frozen=True)
class _Window:
    """What is planned at a time: the rows of each step, and the lengths of all samples that were looked at for it."""

    number: int
    steps: range
    batches: list[list[list[Ref]]]
    lengths: Mapping[Ref, int]


class Batches:
    """Batches over a mix: `batches[step]` are the samples of a step, a pure function of the step.

    Draws are planned in windows of at most `window` batches. A whole number of windows makes an epoch of the set that
    is through first: so an epoch shows every sample, and none stands beside itself because a window repeats it.
    `bucketed` sorts a window by length, so that a batch pads little, and shuffles the order of its batches; samples of
    which nothing is said are the shortest, so they are sorted for themselves and dealt out evenly. `packed` fills the
    rows of a step with its samples, whole ones. A sample of length 0 is left out, and a later draw takes its place.
    Which samples a step has, `batch_size` of them, depends on neither ranks nor micro-batches.

    Args:
        mix: the stream of samples.
        batch_size: samples per step, over all ranks.
        length: tokens of a sample; needed unless `shuffled`.
        max_length: tokens that a packed row holds.
        media: media of a sample, and `max_media` the number that a packed row holds.
        least: micro-batches that a rank's step is split into, `rows[micro::least]` each; every one has a row.
        bare: whether nothing is said of a sample, so that only some terms of the loss learn from it.
    """

    def __init__(
        self,
        mix: Mix,
        batch_size: int,
        batching: Batching = "bucketed",
        length: Callable[[Ref], int] | None = None,
        window: int = 32,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        max_length: int = 2048,
        media: Callable[[Ref], int] = lambda ref: 0,
        max_media: int | None = None,
        least: int = 1,
        bare: Callable[[Ref], bool] = lambda ref: False,
    ) -> None:
        if batch_size < world_size * least:
            raise ConfigError(
                f"batch_size {batch_size} leaves some of {world_size} ranks without work in one of {least} "
                "micro-batches",
                "raise it",
            )
        if length is None and batching != "shuffled":
            raise ConfigError(f"{batching} batching needs the samples' lengths", "give a length, or shuffle")
        self.mix, self.batch_size, self.seed = mix, batch_size, seed
        steps = mix.unrepeated / batch_size
        self._wide = steps / math.ceil(steps / window)
        self.window = len(self._steps(0))
        self.world_size, self.rank = world_size, rank
        self.max_length, self.max_media, self.least = max_length, max_media, least
        self._length, self._media, self._bare = length, media, bare
        self._arrange = {"bucketed": self._bucketed, "shuffled": self._shuffled, "packed": self._packed}[batching]
        self._planned: _Window | None = None

    def __getitem__(self, step: int) -> list[Ref]:
        """This rank's samples of a step."""
        return [ref for row in self.rows(step) for ref in row]

    def rows(self, step: int) -> list[list[Ref]]:
        """This rank's rows of a step; a row holds several samples only when packed.

        Raises:
            DataError: see `whole`.
        """
        return self.whole(step)[self.rank :: self.world_size]

    def whole(self, step: int) -> list[list[Ref]]:
        """All ranks' rows of a step.

        Raises:
            DataError: overlong samples were left out until nothing remained of a window and as many draws behind it.
        """
        window = self._around(step)
        return window.batches[step - window.steps.start]

    def around(self, step: int) -> tuple[range, int]:
        """The steps that are planned together with this one, and the number of samples that were looked at for them.

        Raises:
            DataError: see `whole`.
        """
        window = self._around(step)
        return window.steps, len(window.lengths)

    def padding_share(self, steps: range) -> float:
        """Share of the tokens of these steps' batches on this rank that is padding."""
        if self._length is None:
            raise ConfigError("padding cannot be told without lengths", "give the batches a length")
        real = padded = 0
        for step in steps:
            known = self._around(step).lengths
            lengths = [sum(known[ref] for ref in row) for row in self.rows(step)]
            real += sum(lengths)
            padded += sum(max(micro) * len(micro) for micro in (lengths[k :: self.least] for k in range(self.least)))
        return 1 - real / padded

    def _steps(self, window: int) -> range:
        """The steps of a window. Its width need not be a whole number: a step is of the window in which it starts."""
        return range(math.ceil(window * self._wide), math.ceil((window + 1) * self._wide))

    def _around(self, step: int) -> _Window:
        number = step // self._wide
        if self._planned is None or self._planned.number != number:
            self._planned = self._plan(number)
        return self._planned

    def _plan(self, number: int) -> _Window:
        steps, lengths = self._steps(number), dict[Ref, int]()
        first, wanted = steps.start * self.batch_size, len(steps) * self.batch_size

        def fits(ref: Ref) -> bool:
            if ref not in lengths:
                lengths[ref] = 1 if self._length is None else self._length(ref)
            return lengths[ref] > 0

        # A stand-in comes from the draws behind the window, since one of the window's own would stand beside itself.
        refs = list(islice(filter(fits, map(self.mix.__getitem__, range(first, first + 2 * wanted))), wanted))
        if not refs:
            raise DataError(
                f"all {wanted} samples of steps {steps[0]} to {steps[-1]} are longer than max_length",
                "raise max_length, or set overlong to oldest",
            )
        refs += islice(cycle(tuple(refs)), wanted - len(refs))
        return _Window(number, steps, self._arrange(refs, lengths, number), lengths)

    def _shuffled(self, refs: list[Ref], lengths: Mapping[Ref, int], number: int) -> list[list[list[Ref]]]:
        return _deal([[ref] for ref in refs], len(self._steps(number)))

    def _bucketed(self, refs: list[Ref], lengths: Mapping[Ref, int], number: int) -> list[list[list[Ref]]]:
        order = sorted(refs, key=lengths.__getitem__)
        bare = [[ref] for ref in order if self._bare(ref)]
        said = [[ref] for ref in order if not self._bare(ref)]
        steps = len(self._steps(number))
        ends = [(len(refs) * k // steps, len(bare) * k // steps) for k in range(steps + 1)]
        batches = [
            [*bare[before:after], *said[start - before : end - after]]
            for (start, before), (end, after) in zip(ends, ends[1:])
        ]
        return self._shuffle(batches, number)

    def _packed(self, refs: list[Ref], lengths: Mapping[Ref, int], number: int) -> list[list[list[Ref]]]:
        least = self.world_size * self.least
        batches = []
        for batch in _deal(refs, len(self._steps(number))):
            sizes, media = [lengths[ref] for ref in batch], [self._media(ref) for ref in batch]
            rows = pack(sizes, media, self.max_length, self.max_media, least)
            batches.append([[batch[index] for index in row] for row in rows])
        return batches

    def _shuffle(self, items: list, number: int) -> list:
        return [items[permuted(place, len(items), (self.seed, -1, number))] for place in range(len(items))]


def by_size(weights: Sequence[float], sets: Sequence[Sized], power: float) -> list[float]:
    """Weights times the sizes of their sets to a power.

    0 leaves the weights alone, 1 draws every sample as often as any other, 0.5 is InstructBLIP's root (Dai et al. 2023,
    arXiv 2305.06500), and 1 / T the temperature T of multilingual training.
    """
    return [weight * max(1, len(items)) ** power for weight, items in zip(weights, sets)]


def _deal(rows: list, batches: int) -> list[list]:
    """Contiguous stretches of nearly equal size."""
    return [rows[len(rows) * k // batches : len(rows) * (k + 1) // batches] for k in range(batches)]


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total`, none of them zero (largest remainders)."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) < total:
        counts[max(range(len(counts)), key=lambda number: exact[number] - counts[number])] += 1
    while sum(counts) > total:
        counts[max(range(len(counts)), key=lambda number: (counts[number] > 1, counts[number] - exact[number]))] -= 1
    return counts
