"""Image-text contrast: a picture's best query against the start of a text, both ways over the batch.

BLIP-2's first stage, Li et al. 2023, arXiv 2301.12597, after ALBEF, Li et al. 2021, arXiv 2107.07651, whose slow copy
and queue are options; CLIP (arXiv 2103.00020) is the same with one vector per picture. Official code:
github.com/salesforce/LAVIS, `blip2_qformer.py`; github.com/salesforce/ALBEF, `models/model_pretrain.py`.

Differs:
    - equal texts of a batch (and of the queue) are positives of each other, with equal shares; where all differ it is
      the same;
    - a temperature that leaves its range is put back after the update, and so gets a gradient again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.objectives._captions import (
    captions,
    directions,
    everywhere,
    features,
    nowhere,
    reads_captions,
    same,
    shares,
    spoken,
    summed,
)
from isthmus.objectives._momentum import Distilled, Queue, keys, slow
from isthmus.types import Batch, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step


class ITC(Objective):
    """Queries see queries and text sees text; which belongs to which?"""

    class Options(Distilled):
        smoothing: float = Field(0.1, ge=0, lt=1)
        """Share of the target that is spread over the batch."""
        queue: int = Field(0, ge=0)
        """Pictures and texts of earlier steps that are negatives too, as the slow copy saw them; ALBEF's are 65 536."""
        temperature: tuple[float, float] | None = None
        """The range in which the learned temperature is kept: (0.001, 0.5) in ALBEF, at least 0.01 in CLIP."""

    name: ClassVar[str] = "itc"
    needs = "encoded"
    splits = False

    def __init__(self, options: Frozen):
        super().__init__(options)
        self.momentum = self.options.decay if self.options.alpha or self.options.queue else None
        self.queues = nn.ModuleDict()
        self.seen: dict[str, tuple[Tensor, ...]] = {}  # by the slow copy in this step

    def check(self, vlm: VLM) -> None:
        reads_captions(vlm)

    def begin(self, step: Step) -> None:
        """Make the queues."""
        for kind, former in step.vlm.connectors.items() if self.options.queue else ():
            queries, width = len(former.queries), former.heads.picture.out_features
            self.queues[kind] = Queue(self.options.queue, queries, width, former.queries.device)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        for kind, queue in self.queues.items():
            if kind in self.seen:
                queue.push(*self.seen.pop(kind))  # type: ignore[operator]
        if self.options.temperature is not None:
            for former in step.vlm.connectors.values():
                former.heads.temperature.clamp_(*self.options.temperature)

    def count(self, batch: Batch) -> int:
        return sum(map(len, captions(batch).values()))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        self.seen.clear()
        beside_slow = self.momentum is not None and self.training
        compare = self._with_slow if beside_slow else self._with_each_other
        return summed((compare(step, output, batch, kind) for kind in step.vlm.connectors), batch)

    def with_media(self, vlm: VLM, kind: str) -> Sequence[nn.Module]:
        return (vlm.connectors[kind],)

    def _with_each_other(self, step: Step, output: Output, batch: Batch, kind: str) -> Tensor:
        """The pictures and texts of all processes, by each of them alike."""
        ids_MT, picture_MQC, text_MC = everywhere(self.peers, step, output, batch, kind)
        if not len(ids_MT):
            return text_MC.sum()
        logits_MM = step.vlm.connectors[kind].heads.compare(picture_MQC, text_MC).float()
        target_MM = shares(same(ids_MT))
        whole = (self._entropy(logits_MM, target_MM) + self._entropy(logits_MM.T, target_MM)) / 2
        return whole / self.peers.size

    def _with_slow(self, step: Step, output: Output, batch: Batch, kind: str) -> Tensor:
        """Against what the slow copy sees of this batch and saw before; what it finds alike softens the targets."""
        compare, weight = step.vlm.connectors[kind].heads.compare, self.options.weight(slow(step).updates)
        picture_NQC, text_NC = directions(step, output, batch, kind)
        with torch.no_grad():
            own = slow_NQC, slow_NC, key_N = self._slowly(step, output, batch, kind)
            all_MQC, all_MC, key_M = self._with_queue(kind, tuple(map(self.peers.all_gather, own)))
            if not len(key_N):
                return text_NC.sum()
            hard_NM = shares(key_N[:, None] == key_M)
            soft_text_NM = compare(slow_NQC, all_MC).float().softmax(1)
            soft_picture_NM = compare(all_MQC, slow_NC).T.float().softmax(1)
        to_text = self._entropy(compare(picture_NQC, all_MC).float(), torch.lerp(hard_NM, soft_text_NM, weight))
        to_picture = self._entropy(compare(all_MQC, text_NC).T.float(), torch.lerp(hard_NM, soft_picture_NM, weight))
        return (to_text + to_picture) / 2

    def _slowly(self, step: Step, output: Output, batch: Batch, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """`directions` as the slow copy has them, and a key for every text."""
        ids_NT, copy = spoken(batch, kind), slow(step).connectors[kind]
        if not len(ids_NT):
            return *nowhere(copy), keys(ids_NT)
        picture_NQC = copy.heads.directions(copy.see(features(step, output, batch, kind))[-1])
        text_NC = copy.heads.direction(copy.read(ids_NT)[:, 0])
        return picture_NQC.float(), text_NC.float(), keys(ids_NT)

    def _with_queue(self, kind: str, now: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the slow copy sees now, and behind it what is in the queue, which takes it up after the step."""
        if kind not in self.queues:
            return now
        self.seen[kind] = now
        return tuple(map(torch.cat, zip(now, self.queues[kind].held())))  # type: ignore[operator]

    def _entropy(self, logits_NM: Tensor, target_NM: Tensor) -> Tensor:
        return F.cross_entropy(logits_NM, target_NM, reduction="sum", label_smoothing=self.options.smoothing)
