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

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.objectives._captions import captions, features, read, reads_captions, same, seen, shares, summed
from isthmus.objectives._momentum import Distilled, Queue, keys, slow
from isthmus.types import Batch, Features, Output

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
        self.seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # by the slow copy in this step

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
        return summed((self._kind(step, output, kind, ids, batch) for kind, ids in captions(batch).items()), batch)

    def _kind(self, step: Step, output: Output, kind: str, ids_NT: Tensor, batch: Batch) -> Tensor:
        heads = step.vlm.connectors[kind].heads
        picture_NQC = heads.directions(seen(step, output, batch, kind)[-1])
        text_NC = heads.direction(read(step, output, batch, kind)[:, 0])
        if self.momentum is not None and self.training:
            shown = features(step, output, batch, kind)
            return self._beside_slow(step, kind, picture_NQC, text_NC, shown, ids_NT)
        logits_NN = heads.compare(picture_NQC, text_NC).float()
        target_NN = shares(same(ids_NT))
        return (self._entropy(logits_NN, target_NN) + self._entropy(logits_NN.T, target_NN)) / 2

    def _beside_slow(
        self, step: Step, kind: str, picture_NQC: Tensor, text_NC: Tensor, shown: Features, ids_NT: Tensor
    ) -> Tensor:
        """Against what the slow copy sees of this batch and saw before; what it finds alike softens the targets."""
        compare, weight = step.vlm.connectors[kind].heads.compare, self.options.weight(slow(step).updates)
        with torch.no_grad():
            copy = slow(step).connectors[kind]
            slow_NQC = copy.heads.directions(copy.see(shown)[-1])
            slow_NC = copy.heads.direction(copy.read(ids_NT)[:, 0])
            now = slow_NQC.float(), slow_NC.float(), keys(ids_NT)
            all_MQC, all_MC, key_M = self._with_queue(kind, now)
            hard_NM = shares(now[2][:, None] == key_M)
            soft_text_NM = compare(slow_NQC, all_MC).float().softmax(1)
            soft_picture_NM = compare(all_MQC, slow_NC).T.float().softmax(1)
        to_text = self._entropy(compare(picture_NQC, all_MC).float(), torch.lerp(hard_NM, soft_text_NM, weight))
        to_picture = self._entropy(compare(all_MQC, text_NC).T.float(), torch.lerp(hard_NM, soft_picture_NM, weight))
        return (to_text + to_picture) / 2

    def _with_queue(self, kind: str, now: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """What the slow copy sees now, and behind it what is in the queue, which takes it up after the step."""
        if kind not in self.queues:
            return now
        self.seen[kind] = now
        return tuple(map(torch.cat, zip(now, self.queues[kind].held())))  # type: ignore[operator]

    def _entropy(self, logits_NM: Tensor, target_NM: Tensor) -> Tensor:
        return F.cross_entropy(logits_NM, target_NM, reduction="sum", label_smoothing=self.options.smoothing)
