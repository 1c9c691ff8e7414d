"""What objectives share that learn from a slow copy of the connectors: their options, and a queue of what it saw.

ALBEF's momentum distillation, Li et al. 2021, arXiv 2107.07651. Official code: github.com/salesforce/ALBEF,
`models/model_pretrain.py`.

Differs:
    - a queue starts empty and grows; theirs starts full of random directions;
    - its length need not be a multiple of the batch, and equal texts in it are no negatives;
    - a picture has as many entries in it as queries, since its best one is compared;
    - validation asks the data alone, without copy and queue, so that its loss moves with the weights and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from isthmus.config import Frozen

SPREAD = 6364136223846793005
"""An odd number whose powers, modulo 2^64, leave nothing of the order of small numbers."""


class Distilled(Frozen):
    """Options of an objective that may learn from the slow copy."""

    alpha: float = Field(0.0, ge=0, le=1)
    """Weight of what the slow copy says against what the data say; ALBEF's is 0.4. At 0 there is no copy."""
    ramp: int = Field(0, ge=0)
    """Optimizer steps over which `alpha` rises from 0; ALBEF's are the first epoch."""
    decay: float = Field(0.995, ge=0, lt=1)
    """Share of itself that the slow copy keeps at every step; all objectives of a stage have the same."""

    def weight(self, updates: Tensor) -> Tensor:
        """`alpha` after so many updates, a scalar."""
        return (
            self.alpha * (updates / self.ramp).clamp(max=1)
            if self.ramp
            else torch.full_like(updates.float(), self.alpha)
        )


class Queue(nn.Module):
    """The last pictures and texts that the slow copy saw, as directions; equal texts are known by equal keys.

    Args:
        size: K, how many of each.
        queries: Q, entries of a picture.
        width: C of a direction.
        device: where it lives.
    """

    picture_KQC: Tensor
    text_KC: Tensor
    key_K: Tensor
    pushed: Tensor
    """How many have ever entered."""

    def __init__(self, size: int, queries: int, width: int, device: torch.device):
        super().__init__()
        self.register_buffer("picture_KQC", torch.zeros(size, queries, width, device=device))
        self.register_buffer("text_KC", torch.zeros(size, width, device=device))
        self.register_buffer("key_K", torch.zeros(size, dtype=torch.long, device=device))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long, device=device))

    def held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [M, Q, C], texts [M, C] and keys [M] that are in it, in no order."""
        full = min(int(self.pushed), len(self.key_K))
        return self.picture_KQC[:full], self.text_KC[:full], self.key_K[:full]

    @torch.no_grad()
    def push(self, picture_NQC: Tensor, text_NC: Tensor, key_N: Tensor) -> None:
        """The new ones take the places of the oldest; of more than K, the last ones stay."""
        size = len(self.key_K)
        kept = min(size, len(key_N))
        place = torch.arange(len(key_N) - kept, len(key_N), device=key_N.device) + self.pushed
        for buffer, new in ((self.picture_KQC, picture_NQC), (self.text_KC, text_NC), (self.key_K, key_N)):
            buffer[place % size] = new[len(new) - kept :].to(buffer)
        self.pushed += len(key_N)


def keys(ids_NT: Tensor) -> Tensor:
    """A number for every text, the same for the same words whatever padding follows them, [N]."""
    return ((ids_NT + 1) * ids_NT.new_full(ids_NT.shape[1:], SPREAD).cumprod(0)).sum(1)


def slow(step: Any) -> Any:
    """The slow copy of a step: its `connectors` by kind, and how many `updates` it has seen."""
    return step.companions["momentum"]
