"""Image-text contrast: a picture's best query against the start of a text, both ways over the batch.

BLIP-2's first stage, Li et al. 2023, arXiv 2301.12597, after ALBEF, arXiv 2107.07651. Official code:
github.com/salesforce/LAVIS, `blip2_qformer.py`.

Differs: equal texts of a batch are positives of each other, with equal shares; where all differ it is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.types import Batch, DataError, Output

if TYPE_CHECKING:
    from isthmus.objectives import Step


class ITC(Objective):
    """Queries see queries and text sees text; which belongs to which?"""

    class Options(Frozen):
        smoothing: float = Field(0.1, ge=0, lt=1)
        """Share of the target that is spread over the batch."""

    name: ClassVar[str] = "itc"
    needs = "connected"
    splits = False

    def count(self, batch: Batch) -> int:
        return sum(map(len, captions(batch).values()))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        return torch.stack([self._kind(step, kind, ids, batch) for kind, ids in captions(batch).items()]).sum()

    def _kind(self, step: Step, kind: str, ids_NT: Tensor, batch: Batch) -> Tensor:
        former = step.vlm.connectors[kind]
        q_NQW = former.see(step.vlm.encode(kind, batch.media[kind]))[-1]
        logits_NN = former.heads.similarity(q_NQW, former.read(ids_NT)[:, 0]).float()
        target_NN = same(ids_NT).to(logits_NN)
        target_NN = target_NN / target_NN.sum(1, keepdim=True)
        both = [
            F.cross_entropy(x, target_NN, reduction="sum", label_smoothing=self.options.smoothing)
            for x in (logits_NN, logits_NN.T)
        ]
        return (both[0] + both[1]) / 2


def captions(batch: Batch) -> dict[str, Tensor]:
    """What is said of each medium in the connector's vocabulary, ids [N, T] by kind.

    Raises:
        DataError: the joint reads none.
    """
    if batch.media and not batch.extra_text:
        raise DataError("no captions for the Q-Former's text half", "use aligner blip2 with aligner.options.text=true")
    return batch.extra_text


def same(ids_NT: Tensor) -> Tensor:
    """Which texts are equal, [N, N]."""
    return (ids_NT[:, None] == ids_NT[None]).all(-1)
