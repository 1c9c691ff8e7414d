"""Symmetric InfoNCE between connected media and the words that name them, in the LLM's own input space.

CLIP's loss (Radford et al. 2021, arXiv 2103.00020, github.com/openai/CLIP; open code: mlfoundations/open_clip), used
to warm a connector up without running the LLM.
Differs:
    - the text tower is the LLM's input embedding: the mean over a sample's supervised tokens, centred over the batch
      (what all texts share says nothing), and without gradient;
    - samples with the same supervised tokens are positives of each other, with equal shares.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.objectives import Objective
from isthmus.types import IGNORE, Batch, ConfigError, DataError, Output

if TYPE_CHECKING:
    from isthmus.objectives import Step

TEMPERATURE = 0.07
"""At the start; it is learned as the logarithm of its inverse."""
SHARPEST = 100.0
"""The largest factor of the cosines."""


class Contrastive(Objective):
    """Which text belongs to which medium, both ways, among the media of a batch."""

    name: ClassVar[str] = "contrastive"
    needs = "connected"
    splits = False

    def __init__(self, options: Objective.Options):
        super().__init__(options)
        self.sharpness = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))

    def count(self, batch: Batch) -> int:
        if batch.labels_BT is None or batch.decoder_ids_BU is not None:
            raise ConfigError(
                "contrastive reads labels beside the media, as decoder-only LLMs have them",
                "leave the warm stage out for an encoder-decoder",
            )
        return sum(len(media) for media in batch.media.values())

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        if not self.count(batch):
            return self.sharpness.new_zeros(()) * self.sharpness
        media_ND = torch.cat([y_NQD.float().mean(1) for y_NQD in output.connected.values()])
        texts = [text for kind in output.connected for text in _texts(batch, kind)]
        with torch.no_grad():
            text_ND = torch.stack([output.embed(ids).float().mean(0) for ids in texts])
            text_ND = text_ND - text_ND.mean(0)
        scale = self.sharpness.exp().clamp(max=SHARPEST)
        logits_NN = scale * F.normalize(media_ND, dim=-1) @ F.normalize(text_ND, dim=-1).T
        target_NN = _same(texts).to(logits_NN)
        to_text = F.cross_entropy(logits_NN, target_NN, reduction="sum")
        to_media = F.cross_entropy(logits_NN.T, target_NN, reduction="sum")
        return (to_text + to_media) / 2


def _texts(batch: Batch, kind: str) -> list[Tensor]:
    """The supervised token ids beside each medium of a kind.

    Raises:
        DataError: a medium's sample has none.
    """
    assert batch.labels_BT is not None  # count saw it
    media = batch.media[kind]
    texts = []
    for row, segment in zip(media.row_N, media.segment_N):
        labels = batch.labels_BT[row][batch.segment_BT[row] == segment]
        texts.append(labels[labels != IGNORE])
        if not len(texts[-1]):
            raise DataError(f"a sample among {batch.ids} has no text to compare with", "give it an answer")
    return texts


def _same(texts: list[Tensor]) -> Tensor:
    """Each text's positives as shares that sum to 1, [N, N]."""
    keys = [tuple(text.tolist()) for text in texts]
    same = torch.tensor([[float(a == b) for b in keys] for a in keys])
    return same / same.sum(1, keepdim=True)
