"""VDEP: states at the places of a picture have to tell the projector's own vectors, beside the words of the answer.

"From Visuals to Vocabulary", M. Li et al. 2025, arXiv 2502.09093. No official code was at hand.

The projector's outputs are for pictures what the embedding table is for words ("dynamic embeddings"), and a picture
needs no caption to be learnt from in this way.

Differs:
    - distance, shift, detachment, layer and weight are options with defaults of ours: the paper's text was not at hand;
    - the two modes are mixed sample by sample within every batch; `mix_by: batch` alternates whole batches, as the
      abstract has it;
    - pairs never cross from one picture into the next, whatever lies between them, and pictures may differ in length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.objectives._places import Places, has_states, places, shows, tells
from isthmus.types import Batch, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step

Distance: TypeAlias = Literal["mse", "cosine", "smooth-l1"]
LOOK = 256
"""Vectors of a batch that the log's figures are taken of, spread evenly over it."""


class VDEP(Objective):
    """Distance between states at media places and the connected vectors that stand there or follow."""

    class Options(Frozen):
        distance: Distance = "mse"
        """`mse` of vectors with root mean square 1; `cosine`: one minus it; `smooth-l1` of vectors of length 1, mean
        over the width, as in ViCToR (arXiv 2410.14332)."""
        beta: float = Field(0.01, gt=0)
        """Of `smooth-l1`: where it turns from a square to a line."""
        shift: Literal[0, 1] = 1
        """1 foretells the next vector of the picture, 0 tells the vector that stands there."""
        detach: bool = True
        """Vectors are targets alone. If not, they move towards the states too, and may collapse: watch the log."""
        layer: Literal["last", "before"] | Annotated[int, Field(ge=1)] = "last"
        """Which states: `last` behind the final norm, `before` in front of it, or after so many layers."""
        ratio: float = Field(0.5, ge=0, le=1)
        """Share of the samples with pictures and labels that are in this mode; pictures of which nothing is said always
        are, and text alone never is."""
        mix_by: Literal["sample", "batch"] = "sample"
        """That share of every batch's samples, or whole batches in turn."""
        text: bool = True
        """Samples in this mode are learnt from by the other terms too."""

    name: ClassVar[str] = "vdep"
    unlabelled: ClassVar[bool] = True

    def __init__(self, options: Frozen):
        super().__init__(options)
        self.share, self.by, self.alone = self.options.ratio, self.options.mix_by, not self.options.text
        self.reads = {"last": None, "before": -1}.get(self.options.layer, self.options.layer)
        self.seen: Seen | None = None

    def check(self, vlm: VLM) -> None:
        layer = self.options.layer
        has_states(vlm, self.name, layer if isinstance(layer, int) else None, self.options.shift)

    def about(self, batch: Batch) -> Tensor:
        """Samples in this mode, which show something; where nothing was drawn, all of them, or with the mode off those
        without labels."""
        chosen_BT = ~tells(batch) if batch.draw_BT is None and not self.options.ratio else super().about(batch)
        return chosen_BT & shows(batch)

    def count(self, batch: Batch) -> int:
        return sum(len(here.row_M) for here, _ in self._pairs(batch))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        assert output.hidden_BTD is not None  # Step ran the LLM
        states_BTD = output.hidden_BTD if self.reads is None else output.states[self.reads]
        total = states_BTD[:, :0].float().sum()  # an empty sum: 0, and the graph stays whole
        for kind, (here, there) in zip(batch.media, self._pairs(batch)):
            target_MD = output.connected[kind][there.medium_M, there.vector_M]
            target_MD = target_MD.detach() if self.options.detach else target_MD
            total = total + self._apart(states_BTD[here.row_M, here.column_M], target_MD).sum()
        self.seen = Seen.of(output, batch, total.detach(), self.count(batch))
        return total

    def figures(self) -> dict[str, float]:
        """Of the last forward: `distance`, and `copy`, what it would be if each vector foretold the next by itself;
        `norm`, `spread` and `rank` of the vectors, which fall together when they collapse."""
        if self.seen is None:
            return {}
        found = collapse(self.seen.chosen())
        this_MD, next_MD = self.seen.neighbours()
        if len(this_MD):
            found["copy"] = float(self._apart(this_MD, next_MD).mean())
        if self.seen.count:
            found["distance"] = float(self.seen.total) / self.seen.count
        return found

    def _apart(self, a_MD: Tensor, b_MD: Tensor) -> Tensor:
        return DISTANCES[self.options.distance](a_MD.float(), b_MD.float(), self.options.beta)

    def _pairs(self, batch: Batch) -> list[tuple[Places, Places]]:
        """By kind of medium: where states are read, and the places whose vectors they are to tell."""
        about_BT, shift = self.about(batch), self.options.shift
        found = []
        for kind in batch.media:
            all_of = places(batch, kind)
            here, there = all_of[: len(all_of) - shift], all_of[shift:]
            chosen = (here.medium_M == there.medium_M) & about_BT[here.row_M, here.column_M]
            found.append((here[chosen], there[chosen]))
        return found


# ---------------------------------------------------------------------------------------------- distances


def mse(a_MD: Tensor, b_MD: Tensor, beta: float) -> Tensor:
    """Mean square of the difference after scaling both to root mean square 1, [M]: 2 (1 - cosine)."""
    width = a_MD.shape[-1:]
    return (F.rms_norm(a_MD, width) - F.rms_norm(b_MD, width)).square().mean(-1)


def cosine(a_MD: Tensor, b_MD: Tensor, beta: float) -> Tensor:
    """One minus the cosine, [M]."""
    return 1 - F.cosine_similarity(a_MD, b_MD, dim=-1)


def smooth_l1(a_MD: Tensor, b_MD: Tensor, beta: float) -> Tensor:
    """Smooth L1 after scaling both to length 1, mean over the width, [M]."""
    a_MD, b_MD = F.normalize(a_MD, dim=-1), F.normalize(b_MD, dim=-1)
    return F.smooth_l1_loss(a_MD, b_MD, reduction="none", beta=beta).mean(-1)


DISTANCES: Mapping[Distance, Callable[[Tensor, Tensor, float], Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "smooth-l1": smooth_l1,
}


# ---------------------------------------------------------------------------------------------- figures for the log


@dataclass(frozen=True)
class Seen:
    """What a forward leaves behind for the log: vectors in order, which of them go on in the next, the term's sum."""

    vectors_MD: Tensor
    goes_on_M: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, output: Output, batch: Batch, total: Tensor, count: int) -> Seen | None:
        """Of all media of a batch; None if it has none."""
        if not batch.media:
            return None
        vectors, goes_on = [], []
        for kind in batch.media:
            found = places(batch, kind)
            vectors.append(output.connected[kind].detach()[found.medium_M, found.vector_M].float())
            goes_on.append(F.pad(found.medium_M[1:] == found.medium_M[:-1], (0, 1)))
        return cls(torch.cat(vectors), torch.cat(goes_on), total, count)

    def chosen(self) -> Tensor:
        """At most `LOOK` vectors from all over the batch."""
        return self.vectors_MD[_spread(len(self.vectors_MD))]

    def neighbours(self) -> tuple[Tensor, Tensor]:
        """Pairs of vectors that follow each other in a medium, at most `LOOK`."""
        first_M = self.goes_on_M.nonzero().flatten()
        first_M = first_M[_spread(len(first_M))]
        return self.vectors_MD[first_M], self.vectors_MD[first_M + 1]


def collapse(vectors_MD: Tensor) -> dict[str, float]:
    """Mean length, mean standard deviation over tokens, and the effective rank of how they differ (Roy and Vetterli
    2007: the exponential of the entropy of singular values that sum to 1), which is 1 when nothing differs."""
    centred_MD = vectors_MD - vectors_MD.mean(0)
    share_M = F.normalize(torch.linalg.svdvals(centred_MD), p=1, dim=0)
    rank = torch.special.entr(share_M).sum().exp()
    spread = vectors_MD.std(0, correction=0).mean()
    return {"norm": float(vectors_MD.norm(dim=-1).mean()), "spread": float(spread), "rank": float(rank)}


def _spread(count: int) -> Tensor:
    """At most `LOOK` of so many indices, evenly."""
    return torch.linspace(0, count - 1, min(count, LOOK)).long()
