"""What the terms of a prompt teacher share: its sentences, and how it reads them while it learns.

P-Former, Jian et al. 2023, arXiv 2307.07063. Official code: github.com/yiren-jian/BLIText, `pformer_opt.py`.

Differs: each of the three terms (`prompt_contrast`, `prompt_words`, `prompt_lm`) hides words of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor

from isthmus.config import Frozen
from isthmus.objectives import Objective
from isthmus.types import Batch, ConfigError, NothingToLearn

if TYPE_CHECKING:
    from isthmus.objectives import VLM


class Prompting(Objective):
    """A term over the prompts of a teacher, which lives in the model as `heads.teacher`."""

    needs = "encoded"

    def check(self, vlm: VLM) -> None:
        """Refuse a joint without a prompt teacher."""
        if "teacher" not in vlm.heads:
            raise ConfigError("this joint has no prompt teacher", "use aligner p_former with aligner.options.text=true")


class Teaching(Prompting):
    """A term with which the teacher learns from sentences alone."""

    class Options(Frozen):
        masked: float = Field(0.25, ge=0, lt=1)
        """Share of a sentence's words that are hidden in training."""

    splits: ClassVar[bool] = True
    unpictured: ClassVar[bool] = True

    def count(self, batch: Batch) -> int:
        return len(sentences(batch))

    def read(self, teacher: Any, batch: Batch) -> Tensor:
        """The sentences [N, T] as the teacher reads them: with words hidden in training, whole in validation."""
        ids_NT = sentences(batch)
        return teacher.mask(ids_NT, self.options.masked) if self.training else ids_NT


def sentences(batch: Batch) -> Tensor:
    """What is said without a picture, in the teacher's vocabulary, ids [N, T].

    Raises:
        NothingToLearn: there is nothing of the kind.
    """
    if "text" not in batch.extra_text:
        raise NothingToLearn(
            f"no sentence without a picture among {batch.ids[:8]}", "teach prompts on data of text alone"
        )
    return batch.extra_text["text"]
