"""Image-grounded text generation: the text half writes what is said of a picture, word by word, from the queries.

BLIP-2's first stage, Li et al. 2023, arXiv 2301.12597. Official code: github.com/salesforce/LAVIS, `blip2_qformer.py`.

Differs: the mean is over all words of an optimizer step and not over a device's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.objectives._captions import captions, reads_captions, seen, summed
from isthmus.types import Batch, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step


class ITG(Objective):
    """Queries see queries; words see the queries of every layer and the words before them."""

    class Options(Frozen):
        smoothing: float = Field(0.1, ge=0, lt=1)
        """Share of the target that is spread over the vocabulary."""

    name: ClassVar[str] = "itg"
    needs = "encoded"

    def check(self, vlm: VLM) -> None:
        reads_captions(vlm)

    def count(self, batch: Batch) -> int:
        return sum(int((ids_NT[:, 1:] >= 0).sum()) for ids_NT in captions(batch).values())

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        return summed((self._kind(step, output, kind, ids, batch) for kind, ids in captions(batch).items()), batch)

    def with_media(self, vlm: VLM, kind: str) -> Sequence[nn.Module]:
        return (vlm.connectors[kind],)

    def _kind(self, step: Step, output: Output, kind: str, ids_NT: Tensor, batch: Batch) -> Tensor:
        former, states = step.vlm.connectors[kind], seen(step, output, batch, kind)
        begun_NT = ids_NT.clone()
        begun_NT[:, 0] = len(former.words.word.weight) - 1  # the last entry says that a caption is to be written
        t_NTW = former.read(begun_NT, behind=states)[:, :-1]
        follows_NT = ids_NT[:, 1:]
        logits_MV = former.heads.write(t_NTW[follows_NT >= 0], former.words).float()
        target_M = follows_NT[follows_NT >= 0]
        return F.cross_entropy(logits_MV, target_M, reduction="sum", label_smoothing=self.options.smoothing)
