"""Masked language modelling: words of a text are hidden, and told from the rest of it and from the queries.

ALBEF, Li et al. 2021, arXiv 2107.07651, after BERT (arXiv 1810.04805) and with the picture in sight as in ViLT
(arXiv 2102.03334). Official code: github.com/salesforce/ALBEF, `models/model_pretrain.py`.

Differs:
    - the Q-Former is the multimodal encoder: queries and words see each other both ways;
    - of every text, 15 % of the words and at least one are hidden, where each word is drawn by itself there; so the
      count is known before the forward;
    - what stands for a hidden word is the entry that starts a caption in `itg`, unless `mask` names BERT's own;
    - the head is the one that writes in `itg`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.objectives._captions import captions, features, reads_captions, summed
from isthmus.objectives._momentum import Distilled, slow
from isthmus.types import Batch, Features, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step

MASKED, RANDOM = 0.8, 0.1
"""Of the hidden words, how many are masked and how many replaced by any word; the rest stay as they are."""


class MLM(Objective):
    """Everything sees everything; what were the hidden words?"""

    class Options(Distilled):
        share: float = Field(0.15, gt=0, lt=1)
        """Of a text's words that are hidden; the first and the last entry are its ends and never hidden."""
        mask: int | None = Field(None, ge=0)
        """The entry that stands for a hidden word (BERT's is 103); None is the vocabulary's last one."""

    name: ClassVar[str] = "mlm"
    needs = "encoded"

    def __init__(self, options: Frozen):
        super().__init__(options)
        self.momentum = self.options.decay if self.options.alpha else None

    def check(self, vlm: VLM) -> None:
        reads_captions(vlm)

    def count(self, batch: Batch) -> int:
        return sum(int(quota(words(ids), self.options.share).sum()) for ids in captions(batch).values())

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        return summed((self._kind(step, output, kind, ids, batch) for kind, ids in captions(batch).items()), batch)

    def with_media(self, vlm: VLM, kind: str) -> Sequence[nn.Module]:
        return (vlm.connectors[kind],)

    def _kind(self, step: Step, output: Output, kind: str, ids_NT: Tensor, batch: Batch) -> Tensor:
        former, shown = step.vlm.connectors[kind], features(step, output, batch, kind)
        hidden_NT = draw(words(ids_NT), self.options.share)
        last = len(former.words.word.weight) - 1
        read_NT = replace(ids_NT, hidden_NT, last if self.options.mask is None else self.options.mask, last)
        logits_MV = guess(former, shown, read_NT, hidden_NT)
        hard = F.cross_entropy(logits_MV, ids_NT[hidden_NT], reduction="sum")
        if self.momentum is None or not self.training:
            return hard
        with torch.no_grad():
            soft_MV = guess(slow(step).connectors[kind], shown, read_NT, hidden_NT).softmax(-1)
        soft = F.cross_entropy(logits_MV, soft_MV, reduction="sum")
        return torch.lerp(hard, soft, self.options.weight(slow(step).updates))


def words(ids_NT: Tensor) -> Tensor:
    """Which entries are words of a text, neither padding nor one of its two ends, [N, T]."""
    real_NT = ids_NT >= 0
    inner_NT = real_NT & real_NT.roll(-1, 1)  # something real follows
    inner_NT[:, [0, -1]] = False
    return inner_NT


def quota(word_NT: Tensor, share: float) -> Tensor:
    """How many words of each text are hidden: the share, rounded, and at least one where there is one, [N]."""
    have_N = word_NT.sum(1)
    return (have_N * share).round().long().clamp(min=1).minimum(have_N)


def draw(word_NT: Tensor, share: float) -> Tensor:
    """Which words are hidden, as many of each text as its quota, all equally likely, [N, T]."""
    order_NT = torch.rand(word_NT.shape, device=word_NT.device).masked_fill(~word_NT, 2).argsort(1).argsort(1)
    return order_NT < quota(word_NT, share)[:, None]


def replace(ids_NT: Tensor, hidden_NT: Tensor, mask: int, vocabulary: int) -> Tensor:
    """The text to read: hidden words masked, or any of the first `vocabulary` entries, or as they are, [N, T]."""
    chance_NT = torch.rand(ids_NT.shape, device=ids_NT.device)
    random_NT = torch.randint(vocabulary, ids_NT.shape, device=ids_NT.device)
    read_NT = torch.where(hidden_NT & (chance_NT < MASKED), mask, ids_NT)
    return torch.where(hidden_NT & (chance_NT >= MASKED) & (chance_NT < MASKED + RANDOM), random_NT, read_NT)


def guess(former: Any, shown: Features, read_NT: Tensor, hidden_NT: Tensor) -> Tensor:
    """Logits of the hidden words by a Q-Former that reads the text beside the picture, [M, vocabulary] in float32."""
    t_NTW = former.see(shown, read_NT)[-1][:, len(former.queries) :]
    return former.heads.write(t_NTW[hidden_NT], former.words).float()
