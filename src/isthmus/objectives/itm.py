"""Image-text matching: queries that see a text, and are seen by it, tell whether it belongs to their picture.

BLIP-2's first stage, Li et al. 2023, arXiv 2301.12597, with ALBEF's hard negatives, arXiv 2107.07651. Official code:
github.com/salesforce/LAVIS, `blip2_qformer.py`.

Differs:
    - a text that equals the right one is never drawn as a wrong one;
    - of several processes, each matches the texts that were drawn for its own pictures, so that no picture travels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.objectives import Objective
from isthmus.objectives._captions import PAD, everywhere, features, reads_captions, same, spoken, summed
from isthmus.types import Batch, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step


class ITM(Objective):
    """Right pairs, pictures with a confusable wrong text, texts with a confusable wrong picture: three per picture."""

    name: ClassVar[str] = "itm"
    needs = "encoded"
    splits = False

    def check(self, vlm: VLM) -> None:
        """Refuse a joint without a text half; note the kinds of media, which a batch may lack."""
        reads_captions(vlm)
        self._kinds = tuple(vlm.connectors)

    def count(self, batch: Batch) -> int:
        texts = [spoken(batch, kind) for kind in self._kinds]
        return sum(3 * len(ids_NT) for ids_NT in texts if drawable(self.peers.all_gather(ids_NT, PAD)))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        return summed((self._kind(step, output, batch, kind) for kind in self._kinds), batch)

    def with_media(self, vlm: VLM, kind: str) -> Sequence[nn.Module]:
        return (vlm.connectors[kind],)

    def _kind(self, step: Step, output: Output, batch: Batch, kind: str) -> Tensor:
        ids_MT, picture_MQC, text_MC = everywhere(self.peers, step, output, batch, kind)
        former = step.vlm.connectors[kind]
        picture_P, text_P, right_P = self._pairs(former.heads, ids_MT, picture_MQC, text_MC, len(spoken(batch, kind)))
        if not len(picture_P):
            return text_MC.new_zeros(())
        shown = features(step, output, batch, kind)
        lengths_N = shown.lengths_N
        drawn = replace(
            shown.map(lambda x: x[picture_P]), lengths_N=None if lengths_N is None else lengths_N[picture_P]
        )
        q_PQW = former.see(drawn, ids_MT[text_P])[-1][:, : len(former.queries)]
        logits_P2 = former.heads.match(q_PQW).float().mean(1)
        loss = F.cross_entropy(logits_P2, right_P, reduction="sum")
        return loss if drawable(ids_MT) else loss * 0

    @torch.no_grad()
    def _pairs(
        self, heads: Any, ids_MT: Tensor, picture_MQC: Tensor, text_MC: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs with a picture of this process, [P] each: which of its `count` pictures, which of all texts, and
        whether they belong together. Where all texts are equal there are no wrong ones.
        """
        peers, device = self.peers, ids_MT.device
        mine_M = peers.all_gather(torch.full((count,), peers.rank, device=device)) == peers.rank
        own_N, all_N = mine_M.nonzero().squeeze(1), torch.arange(count, device=device)
        if not drawable(ids_MT):
            return all_N, own_N, torch.ones_like(all_N)
        wrong_NM, chance = ~same(ids_MT)[own_N], self.chance(len(ids_MT)).to(device)
        text_N = hard(heads.compare(picture_MQC[own_N], text_MC), wrong_NM, chance[0, own_N])
        picture_N = hard(heads.compare(picture_MQC, text_MC[own_N]).T, wrong_NM, chance[1, own_N])
        picture_M = peers.all_gather(picture_N)
        # Of one process all are here, whatever is drawn: a forecast draws nothing.
        here_H = own_N if peers.size == 1 else mine_M[picture_M].nonzero().squeeze(1)
        place_H = (mine_M.cumsum(0) - 1)[picture_M[here_H]]
        pictures, texts = torch.cat([all_N, all_N, place_H]), torch.cat([own_N, text_N, here_H])
        return pictures, texts, (torch.arange(len(texts), device=device) < count).long()

    def chance(self, size: int) -> Tensor:
        """Numbers drawn alike by all processes, from what the first one draws, [2, M, M]; see `hard`."""
        seed = int(self.peers.all_gather(torch.randint(2**62, (1,)))[0])
        return torch.empty(2, size, size).exponential_(generator=torch.Generator().manual_seed(seed)).log().neg()


def drawable(ids_MT: Tensor) -> bool:
    """Whether texts differ, so that each has another that is wrong for its picture."""
    return bool((~same(ids_MT)).any())


def hard(similarity_NM: Tensor, wrong_NM: Tensor, chance_NM: Tensor) -> Tensor:
    """For every row something wrong, [N]; likelier the more they are alike.

    With `chance` of Gumbel's distribution, the largest sum is a draw from the softmax of what is wrong.
    """
    return (similarity_NM.float() + chance_NM).masked_fill(~wrong_NM, -torch.inf).argmax(1)
