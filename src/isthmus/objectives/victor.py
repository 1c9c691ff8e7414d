"""ViCToR's term: a head tells, from the states at all places of a picture, the vectors that stood there unreplaced.

Xie et al. 2024, arXiv 2410.14332. Official code: github.com/deepglint/Victor. Smooth L1 with beta 0.01, mean over the
width; the paper's factor of 10 is the objective's weight. Unlike VDEP's, targets are never foretold but filled in.

Differs: a picture needs no caption here.
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
from isthmus.objectives._captions import features
from isthmus.objectives._places import has_states, places
from isthmus.types import Batch, ConfigError, Context, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step


class ViCToR(Objective):
    """Distance between what the head tells and the connector's own vectors, which get no gradient from it."""

    class Options(Frozen):
        beta: float = Field(0.01, gt=0)
        """Where the distance turns from a square to a line."""

    name: ClassVar[str] = "victor"
    unlabelled: ClassVar[bool] = True

    def check(self, vlm: VLM) -> None:
        if "tell" not in vlm.heads:
            raise ConfigError(f"the joint {vlm.aligner.name} has no head that tells vectors", "use the joint victor")
        has_states(vlm, self.name)

    def begin(self, step: Step) -> None:
        """Nothing but a check.

        Raises:
            ConfigError: nothing would be replaced.
        """
        if not any(connector.pool.requires_grad for connector in step.vlm.connectors.values()):
            raise ConfigError(
                "the token pool does not train, so no vector is replaced and none has to be told",
                "add connectors.*.pool to `train`, or leave the objective out",
            )

    def count(self, batch: Batch) -> int:
        return sum(len(places(batch, kind)) for kind in batch.media)

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        assert output.hidden_BTD is not None  # Step ran the LLM
        total = output.hidden_BTD[:, :0].float().sum()  # an empty sum: 0, and the graph stays whole
        for kind in batch.media:
            here, seen = places(batch, kind), features(step, output, batch, kind)
            with torch.no_grad():
                whole_NQD = step.vlm.connectors[kind].whole(seen, Context(batch.extra_text))
            states_MD = output.hidden_BTD[here.row_M, here.column_M]
            told_MD = step.vlm.heads["tell"](states_MD.to(next(step.vlm.heads["tell"].parameters()).dtype))
            target_MD = whole_NQD[here.medium_M, here.vector_M]
            apart = F.smooth_l1_loss(told_MD.float(), target_MD.float(), reduction="none", beta=self.options.beta)
            total = total + apart.mean(-1).sum()
        return total

    def with_media(self, vlm: VLM, kind: str) -> Sequence[nn.Module]:
        return (vlm.heads["tell"],)
