"""Which samples of a step a term of the loss is about, when it is about a share of them.

Every sample of a step draws a number from [0, 1), and a term takes those below its share. Numbers are spread evenly
over the samples in an order of their own, so that each batch has the share to within a sample, and long stretches
have it exactly. Samples that the term passes over (they show nothing, or carry no labels) draw as well, for which
nothing has to be read: of the others, a batch has the share by chance and long stretches have it nearly. Numbers depend
on seed, step and sample alone: a resumed run, another number of processes and packing all draw the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Literal

from isthmus.data.mix import Ref


def draw(refs: Iterable[Ref], step: int, seed: int, by: Literal["sample", "batch"]) -> dict[Ref, float]:
    """What each sample of a step draws; by `batch`, all of them the same."""
    turn = _turn(step)
    if by == "batch":
        return dict.fromkeys(refs, turn)
    order = sorted(set(refs), key=lambda ref: blake2b(repr((seed, step, ref)).encode(), digest_size=8).digest())
    return {ref: (place + turn) / len(order) for place, ref in enumerate(order)}


def _turn(step: int) -> float:
    """The step's binary digits behind the point in reverse (van der Corput): 0, 1/2, 1/4, 3/4, 1/8, ..."""
    turn, weight = 0.0, 0.5
    while step:
        step, digit = divmod(step, 2)
        turn, weight = turn + digit * weight, weight / 2
    return turn
