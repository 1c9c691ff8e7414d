"""Connected pictures are drawn to the prompt that a frozen teacher would make of their captions, slot by slot.

P-Former's guidance, Jian et al. 2023, arXiv 2307.07063. Official code: github.com/yiren-jian/BLIText,
`blip2_qformer_pformer.py` and `blip2_pformer_opt.py`. Its lambda is the weight of this term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.objectives._captions import captions, seen, summed
from isthmus.objectives._prompts import Prompting
from isthmus.types import Batch, Output

if TYPE_CHECKING:
    from isthmus.objectives import Step


class PromptMatch(Prompting):
    """Mean squared distance of the k-th connected token from the k-th vector of the taught prompt."""

    name: ClassVar[str] = "prompt_match"

    def count(self, batch: Batch) -> int:
        return sum(map(len, captions(batch).values()))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        terms = (self._kind(step, output, kind, ids, batch) for kind, ids in captions(batch).items())
        return summed(terms, batch)

    def _kind(self, step: Step, output: Output, kind: str, ids_NT: Tensor, batch: Batch) -> Tensor:
        """Where the LLM is left out, the queries that other terms see are connected here."""
        y_NQD = output.connected.get(kind)
        if y_NQD is None:
            y_NQD = step.vlm.connectors[kind].project(seen(step, output, batch, kind)[-1])
        with torch.no_grad():
            prompt_NQD = step.vlm.heads["teacher"](ids_NT).float()
        return F.mse_loss(y_NQD.float(), prompt_NQD, reduction="none").mean((1, 2)).sum()
