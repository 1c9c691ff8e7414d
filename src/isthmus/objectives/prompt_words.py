"""Every vector of a taught prompt is drawn to the LLM's word embedding that is nearest to it.

P-Former's quantisation term, Jian et al. 2023, arXiv 2307.07063. Official code: github.com/yiren-jian/BLIText,
`pformer_opt.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.objectives._prompts import Teaching
from isthmus.types import Batch, Output

if TYPE_CHECKING:
    from isthmus.objectives import Step

ROWS = 256
"""Vectors whose distances to the whole vocabulary live at once."""


class PromptWords(Teaching):
    """Mean squared distance to the nearest word, which stays where it is."""

    name: ClassVar[str] = "prompt_words"

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        teacher = step.vlm.heads["teacher"]
        prompt_NQD = teacher(self.read(teacher, batch)).float()
        with torch.no_grad():
            word_VD = output.embed(torch.arange(step.vlm.vocabulary, device=prompt_NQD.device))
        word_NQD = nearest(prompt_NQD, word_VD)
        return F.mse_loss(prompt_NQD, word_NQD, reduction="none").mean((1, 2)).sum()


@torch.no_grad()
def nearest(prompt_NQD: Tensor, word_VD: Tensor) -> Tensor:
    """The word embedding nearest to each vector, [N, Q, D], without gradient."""
    word_VD = word_VD.float()
    vectors = prompt_NQD.flatten(0, 1).split(ROWS)
    chosen_M = torch.cat([torch.cdist(each, word_VD).argmin(1) for each in vectors])
    return word_VD[chosen_M].view_as(prompt_NQD)
