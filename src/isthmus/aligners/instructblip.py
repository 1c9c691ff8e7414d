"""InstructBLIP: BLIP-2's Q-Former hears the instruction, so that its queries take from the picture what was asked for.

Dai et al. 2023, arXiv 2305.06500. Official code: github.com/salesforce/LAVIS, `blip2_vicuna_instruct.py`.

Differs:
    - without `tokenizer`, the Q-Former reads the LLM's own vocabulary, and newborn embeddings; the paper's is BERT's;
    - in a conversation, a picture is read under the turn that holds it; the paper has one question per picture;
    - the Q-Former's weights come from the `qformer` option; a BLIP-2 has no text half, so name BERT before it, of which
      that half then is, as the paper's;
    - the last layer's text feed-forward, which no gradient reaches, is left out (see `connectors.qformer`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from isthmus import parts
from isthmus.aligner import Aligner
from isthmus.connectors import Connector, qformer_weights
from isthmus.connectors.qformer import Begun, InstructedQFormer
from isthmus.encoders import Encoder
from isthmus.types import Layout, Reading

if TYPE_CHECKING:
    from isthmus.model import VLM


class InstructBLIP(Aligner):
    """An instruction-aware Q-Former between encoder and LLM."""

    name = "instructblip"
    family = "perceiver"
    also = "data"

    class Options(Begun):
        length: int = Field(128, ge=1)
        """Tokens of an instruction that the Q-Former reads, the last ones."""
        tokenizer: str | None = None
        """Whose vocabulary the Q-Former reads, as a folder or a hub name; None is the LLM's own."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return InstructedQFormer(kind, encoder.width, width, self.options)

    def layout(self, kind: str, tokens: int) -> Layout:
        """Soft tokens alone, with no line break behind them."""
        return Layout(tokens)

    def reading(self) -> Reading:
        return Reading(self.options.length, tokenizer=self.options.tokenizer)

    def birth(self, model: VLM) -> None:
        """Take weights over, where some are named.

        Raises:
            ConfigError: the Q-Former cannot hold the vocabulary that it reads.
        """
        parts.check_vocabulary(model.llm, self.options.tokenizer, self.options.vocabulary)
        qformer_weights.begin(model, self.options.qformer, parts.tensors)
