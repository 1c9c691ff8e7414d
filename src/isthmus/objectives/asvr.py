"""ASVR's term: a head tells, from the states at a picture's places, the codes of what is seen there, level by level.

Wang et al. 2025, arXiv 2506.09040. Official code: github.com/AlenjandroWang/ASVR. The mean over levels of the
cross-entropy, over all places; weight 1 beside the words' in both stages.

Differs:
    - `shift: 1` lets a state tell the next place's codes, as the word autoregressive says; the released code tells
      those of its own place, which is the default;
    - places are those of the scatter; the release cuts them out by counts that left padding displaces;
    - a picture needs no caption here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.objectives._captions import features
from isthmus.objectives._places import Places, has_states, places
from isthmus.types import Batch, ConfigError, Output

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step


class ASVR(Objective):
    """Cross-entropy between what the head tells and the codes, which are fixed before training."""

    class Options(Frozen):
        shift: Literal[0, 1] = 0
        """0 tells the codes of the place itself, 1 those of the next."""

    name: ClassVar[str] = "asvr"
    unlabelled: ClassVar[bool] = True

    def __init__(self, options: Frozen):
        super().__init__(options)
        self.seen: dict[str, float] = {}

    def check(self, vlm: VLM) -> None:
        has_states(vlm, self.name, shift=self.options.shift)
        if vlm.aligner.name != self.name or vlm.aligner.options.tokenizer is None:
            raise ConfigError(
                f"the joint {vlm.aligner.name} has no codes that could be told", "use the joint asvr with a tokenizer"
            )

    def begin(self, step: Step) -> None:
        """Nothing but a check.

        Raises:
            ConfigError: there are no codebooks yet, or they are of an encoder that is about to change.
        """
        for kind, connector in step.vlm.connectors.items():
            if any(weight.requires_grad for weight in step.vlm.encoders[kind].parameters()):
                raise ConfigError(
                    "the encoder trains, and codes of its features would change their meaning",
                    "leave `encoders.*` out of `train`, or leave the objective out",
                )
            if not connector.codebook.fitted:
                raise ConfigError(
                    f"the codebooks of the joint's {kind}s are empty", "fit them with isthmus.prepare.codes.settle"
                )

    def count(self, batch: Batch) -> int:
        return sum(len(here) for here, _ in self._pairs(batch))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        assert output.hidden_BTD is not None  # Step ran the LLM
        total = output.hidden_BTD[:, :0].float().sum()  # an empty sum: 0, and the graph stays whole
        self.seen = {}
        for kind, (here, there) in zip(batch.media, self._pairs(batch)):
            connector, seen = step.vlm.connectors[kind], features(step, output, batch, kind)
            with torch.no_grad():
                codes_NQL = connector.codes(seen)
            codes_ML = codes_NQL[there.medium_M, there.vector_M]
            states_MD = output.hidden_BTD[here.row_M, here.column_M]
            logits_MLK = connector.teller(states_MD, connector.codebook.sums(codes_ML))
            apart = F.cross_entropy(logits_MLK.flatten(0, 1).float(), codes_ML.flatten(), reduction="sum")
            total = total + apart / codes_ML.shape[1]
            self._look(logits_MLK, codes_ML)
        return total

    def with_media(self, vlm: VLM, kind: str) -> Sequence[nn.Module]:
        return (vlm.connectors[kind].teller,)

    def figures(self) -> dict[str, float]:
        """Of the last forward and the first level: `right`, the share of codes that were told, and `common`, the share
        of the commonest code, which whoever sees nothing could tell."""
        return self.seen

    def _look(self, logits_MLK: Tensor, codes_ML: Tensor) -> None:
        first_M = codes_ML[:, 0]
        if first_M.is_meta or not len(first_M):
            return
        right = (logits_MLK[:, 0].argmax(-1) == first_M).float().mean()
        self.seen = {"right": float(right), "common": float(first_M.bincount().max() / len(first_M))}

    def _pairs(self, batch: Batch) -> list[tuple[Places, Places]]:
        """By kind of medium: where states are read, and the places whose codes they are to tell."""
        found, shift = [], self.options.shift
        for kind in batch.media:
            all_of = places(batch, kind)
            here, there = all_of[: len(all_of) - shift], all_of[shift:]
            same = here.medium_M == there.medium_M
            found.append((here[same], there[same]))
        return found
