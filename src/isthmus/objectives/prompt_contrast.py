"""Sentences told from each other by what a prompt teacher gathers of them, while it learns from text alone.

P-Former, Jian et al. 2023, arXiv 2307.07063. Official code: github.com/yiren-jian/BLIText, `pformer_opt.py`.

Differs: equal sentences of a batch are positives of each other, with equal shares; where all differ it is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from isthmus.objectives._captions import PAD, same, shares
from isthmus.objectives._prompts import Teaching, sentences
from isthmus.types import Batch, Output

if TYPE_CHECKING:
    from isthmus.objectives import Step


class PromptContrast(Teaching):
    """Which sentence of the batch is this?"""

    class Options(Teaching.Options):
        smoothing: float = Field(0.1, ge=0, lt=1)
        """Share of the target that is spread over the batch."""

    name: ClassVar[str] = "prompt_contrast"
    splits = False

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        teacher = step.vlm.heads["teacher"]
        sentence_MC = self.peers.all_gather(teacher.direction(self.read(teacher, batch)).float())
        logits_MM = (sentence_MC @ sentence_MC.T / teacher.temperature).float()
        target_MM = shares(same(self.peers.all_gather(sentences(batch), PAD)))
        whole = F.cross_entropy(logits_MM, target_MM, reduction="sum", label_smoothing=self.options.smoothing)
        return whole / self.peers.size
