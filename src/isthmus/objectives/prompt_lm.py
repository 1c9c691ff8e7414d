"""A frozen LLM writes a sentence from the prompt that a teacher made of it.

P-Former's reconstruction, Jian et al. 2023, arXiv 2307.07063. Official code: github.com/yiren-jian/BLIText,
`pformer_opt.py`.

Differs: the mean is over all words of an optimizer step and not over a device's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from isthmus.objectives._prompts import Teaching
from isthmus.objectives.lm import cross_entropy
from isthmus.types import Batch, ConfigError, DataError, Output, Past

if TYPE_CHECKING:
    from isthmus.objectives import VLM, Step


class PromptLM(Teaching):
    """Next-token cross-entropy of sentences behind their prompts.

    A sentence is the whole row of its sample, so data belong in the `plain` template, with one answer each.
    """

    class Options(Teaching.Options):
        rows: int = Field(256, ge=1)
        """Rows of logits that live at once."""

    name: ClassVar[str] = "prompt_lm"

    def check(self, vlm: VLM) -> None:
        """Refuse an LLM that reads its prompt in one place and writes in another."""
        super().check(vlm)
        if vlm.config.is_encoder_decoder:
            raise ConfigError("prompts are taught with decoder-only LLMs", "choose a decoder-only LLM")

    def count(self, batch: Batch) -> int:
        return sum(map(len, written(batch)))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        teacher = step.vlm.heads["teacher"]
        prompt_NQD = teacher(self.read(teacher, batch))
        return reconstruction(step, output, prompt_NQD, written(batch), self.options.rows)


def reconstruction(step: Step, output: Output, prompt_NQD: Tensor, texts: list[Tensor], rows: int) -> Tensor:
    """The summed cross-entropy of texts, ids in the LLM's vocabulary, each behind its own prompt."""
    ids_NT = pad_sequence(texts, batch_first=True, padding_value=-1)
    real_NT = ids_NT >= 0
    word_NTD = output.embed(ids_NT.clamp(min=0))
    queries = prompt_NQD.shape[1]
    segment_NT = F.pad(real_NT.long(), (queries, 0), value=1)
    embeds_NTD = torch.cat([prompt_NQD.to(word_NTD.dtype), word_NTD], 1)
    hidden_NTD, _, _ = step.vlm.think(embeds_NTD, segment_NT, torch.zeros_like(segment_NT), None, Past(None))
    return cross_entropy(hidden_NTD[:, queries - 1 : -1][real_NT], ids_NT[real_NT], output.head, rows)


def written(batch: Batch) -> list[Tensor]:
    """The LLM's ids of every sample without a medium, in the order in which `_prompts.sentences` has them.

    Raises:
        DataError: one of them has branches, which are several sentences in one row.
    """
    pictured = {
        place for media in batch.media.values() for place in zip(media.row_N.tolist(), media.segment_N.tolist())
    }
    texts = []
    for row, segment_T in enumerate(batch.segment_BT):
        for segment in range(1, int(segment_T.max()) + 1):
            if (row, segment) in pictured:
                continue
            if batch.branch_BT is not None and batch.branch_BT[row][segment_T == segment].any():
                raise DataError(f"several answers in one sample among {batch.ids[:8]}", "give each a sample of its own")
            texts.append(batch.input_ids_BT[row][segment_T == segment])
    return texts
