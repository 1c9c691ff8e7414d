"""P-Former: what prompt a frozen LLM wants is learned from sentences alone, and then shown to BLIP-2's Q-Former.

Jian et al. 2023, arXiv 2307.07063 (P-Former), on Li et al. 2023, arXiv 2301.12597 (BLIP-2). Official code:
github.com/yiren-jian/BLIText.

The teacher is a head of the model, so that every stage finds what the one before left: it alone trains first
(`prompt_contrast`, `prompt_words`, `prompt_lm`), then it is frozen and `prompt_match` compares it with the queries.

Differs:
    - teacher and text half read one vocabulary, without `tokenizer` the LLM's own; the paper's is BERT's;
    - a line break behind the sentence is the LLM's end token, and the teacher does not read it;
    - with `text`, both stay in the model to the end, frozen; the paper drops them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch import nn

from isthmus import parts
from isthmus.aligner import Aligner
from isthmus.connectors import Connector, qformer_weights
from isthmus.connectors.prompt_teacher import PromptTeacher
from isthmus.connectors.qformer import Begun, QFormer
from isthmus.encoders import Encoder
from isthmus.types import Layout, Reading

if TYPE_CHECKING:
    from isthmus.model import VLM


class PFormer(Aligner):
    """BLIP-2's Q-Former, and beside it a teacher of the same size that never sees a picture."""

    name = "p_former"
    family = "perceiver"

    class Options(Begun):
        text: bool = True
        """Carry the Q-Former's text half and the prompt teacher, which training needs and answering does not."""
        length: int = Field(32, ge=3)
        """Tokens of a sentence that teacher and text half read."""
        tokenizer: str | None = None
        """Whose vocabulary they have, as a folder or a hub name; None is the LLM's own."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return QFormer(encoder.width, width, self.options, "whole" if self.options.text else None)

    def heads(self, width: int) -> dict[str, nn.Module]:
        """The teacher, `heads.teacher`, in the LLM's input space."""
        return {"teacher": PromptTeacher(self.options, width)} if self.options.text else {}

    def layout(self, kind: str, tokens: int) -> Layout:
        """Soft tokens alone, with no line break behind them."""
        return Layout(tokens)

    def reading(self) -> Reading | None:
        """Captions, for teacher and text half."""
        if not self.options.text:
            return None
        return Reading(self.options.length, "answer", self.options.tokenizer)

    def birth(self, model: VLM) -> None:
        """Take weights over, where some are named; of BERT's, the teacher begins with them too.

        Raises:
            ConfigError: there is no room for the vocabulary that is read, and one more entry.
        """
        if self.options.text:
            parts.check_vocabulary(model.llm, self.options.tokenizer, self.options.vocabulary, own=1)
        qformer_weights.begin(model, self.options.qformer, parts.tensors)
