"""Image-text matching: queries that see a text, and are seen by it, tell whether it belongs to their picture.

BLIP-2's first stage, Li et al. 2023, arXiv 2301.12597, with ALBEF's hard negatives, arXiv 2107.07651. Official code:
github.com/salesforce/LAVIS, `blip2_qformer.py`.

Differs: a text that equals the right one is never drawn as a wrong one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.objectives import Objective
from isthmus.objectives._captions import captions, features, read, reads_captions, same, seen, summed
from isthmus.types import Batch, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step

NEVER = -1e4
"""Added to the similarity of what must not be drawn."""


class ITM(Objective):
    """Right pairs, pictures with a confusable wrong text, texts with a confusable wrong picture: three per picture."""

    name: ClassVar[str] = "itm"
    needs = "encoded"
    splits = False

    def check(self, vlm: VLM) -> None:
        reads_captions(vlm)

    def count(self, batch: Batch) -> int:
        return sum(3 * len(ids) for ids in captions(batch).values() if drawable(ids))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        terms = (self._kind(step, output, kind, ids, batch) for kind, ids in captions(batch).items() if drawable(ids))
        return summed(terms, batch)

    def _kind(self, step: Step, output: Output, kind: str, ids_NT: Tensor, batch: Batch) -> Tensor:
        former, shown = step.vlm.connectors[kind], features(step, output, batch, kind)
        q_NQW, t_NTW = seen(step, output, batch, kind)[-1], read(step, output, batch, kind)
        with torch.no_grad():
            similarity_NN = former.heads.similarity(q_NQW, t_NTW[:, 0]).float()
        text_N, picture_N = negatives(similarity_NN, ids_NT)
        all_N = torch.arange(len(ids_NT), device=ids_NT.device)
        pictures_M, texts_M = torch.cat([all_N, all_N, picture_N]), torch.cat([all_N, text_N, all_N])
        lengths_N = shown.lengths_N
        drawn = replace(
            shown.map(lambda x: x[pictures_M]), lengths_N=None if lengths_N is None else lengths_N[pictures_M]
        )
        q_MQW = former.see(drawn, ids_NT[texts_M])[-1][:, : len(former.queries)]
        logits_M2 = former.heads.match(q_MQW).float().mean(1)
        right_M = (torch.arange(len(pictures_M), device=all_N.device) < len(all_N)).long()
        return F.cross_entropy(logits_M2, right_M, reduction="sum")


def drawable(ids_NT: Tensor) -> bool:
    """Whether every text has another in the batch that differs from it."""
    return bool((~same(ids_NT)).any(1).all())


def negatives(similarity_NN: Tensor, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
    """For every picture a wrong text, for every text a wrong picture, [N] each; likelier the more they are alike."""
    similarity_NN = similarity_NN.masked_fill(same(ids_NT), NEVER)
    text_N, picture_N = (x.softmax(-1).multinomial(1).squeeze(1) for x in (similarity_NN, similarity_NN.T))
    return text_N, picture_N
