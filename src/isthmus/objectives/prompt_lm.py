"""A frozen LLM writes a sentence from the prompt that a teacher made of it.

P-Former's reconstruction, Jian et al. 2023, arXiv 2307.07063. Official code: github.com/yiren-jian/BLIText,
`pformer_opt.py`.

Differs:
    - the mean is over all words of an optimizer step and not over a device's;
    - what a tokenizer puts before everything (OPT's `</s>`) stands before the prompt, as it will before soft tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        """Refuse an LLM that reads its prompt in one place and writes in another; note what begins its texts."""
        super().check(vlm)
        if vlm.config.is_encoder_decoder:
            raise ConfigError("prompts are taught with decoder-only LLMs", "choose a decoder-only LLM")
        self._beginning: int | None = vlm.llm.config.bos_token_id

    def count(self, batch: Batch) -> int:
        return sum(len(text) for _, text in written(batch, self._beginning))

    def loss(self, step: Step, output: Output, batch: Batch) -> Tensor:
        teacher = step.vlm.heads["teacher"]
        prompt_NQD = teacher(self.read(teacher, batch))
        return reconstruction(step, output, prompt_NQD, written(batch, self._beginning), self.options.rows)


def reconstruction(
    step: Step, output: Output, prompt_NQD: Tensor, said: Sequence[tuple[Tensor, Tensor]], rows: int
) -> Tensor:
    """The summed cross-entropy of texts, each behind its beginning and its own prompt; ids of the LLM's vocabulary."""
    begin_NB = torch.stack([begin for begin, _ in said])  # of one tokenizer, so all as long
    ids_NT = pad_sequence([text for _, text in said], batch_first=True, padding_value=-1)
    real_NT = ids_NT >= 0
    word_NTD = output.embed(ids_NT.clamp(min=0))
    before = begin_NB.shape[1] + prompt_NQD.shape[1]
    segment_NT = F.pad(real_NT.long(), (before, 0), value=1)
    embeds_NTD = torch.cat([output.embed(begin_NB), prompt_NQD.to(word_NTD.dtype), word_NTD], 1)
    hidden_NTD, _, _ = step.vlm.think(embeds_NTD, segment_NT, torch.zeros_like(segment_NT), None, Past(None))
    return cross_entropy(hidden_NTD[:, before - 1 : -1][real_NT], ids_NT[real_NT], output.head, rows)


def written(batch: Batch, beginning: int | None) -> list[tuple[Tensor, Tensor]]:
    """Of every sample without a medium, in the order of `_prompts.sentences`, ids of the LLM's vocabulary: the token
    `beginning`, where the tokenizer puts one before everything, and the text.

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
            ids_T = batch.input_ids_BT[row][segment_T == segment]
            start = int(ids_T[0] == beginning)  # which no text can be typed to be
            texts.append((ids_T[:start], ids_T[start:]))
    return texts
