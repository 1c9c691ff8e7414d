"""BLIP-2: 32 learned queries read a frozen encoder through a Q-Former and stand before the text as a soft prompt.

Li et al. 2023, arXiv 2301.12597. Official code: github.com/salesforce/LAVIS, `blip2_models`.

Differs:
    - without `tokenizer`, the first stage reads and writes the LLM's own vocabulary with newborn embeddings; the
      paper's is BERT's;
    - without `qformer` the Q-Former is newborn, with both feed-forward halves alike; the paper's begins as BERT, and so
      do the published recipes;
    - a caption ends with the LLM's end token, not OPT's line break, and where the tokenizer begins texts with a token
      it stands before the soft tokens;
    - where a caption is cut in two for an encoder-decoder (`template: prefix`), its words decide, alike in every epoch;
      the paper draws the place;
    - with `text`, the text half stays in the model through the second stage, frozen; the paper drops it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from isthmus import parts
from isthmus.aligner import Aligner
from isthmus.connectors import Connector, qformer_weights
from isthmus.connectors.qformer import Begun, QFormer
from isthmus.encoders import Encoder
from isthmus.types import Layout, Reading

if TYPE_CHECKING:
    from isthmus.model import VLM


class BLIP2(Aligner):
    """A Q-Former between encoder and LLM; its text half is there for the first stage alone."""

    name = "blip2"
    family = "perceiver"

    class Options(Begun):
        text: bool = False
        """Carry the text half, which the first stage trains and the second has no use for."""
        length: int = Field(32, ge=3)
        """Tokens of a caption in the first stage."""
        tokenizer: str | None = None
        """Whose vocabulary the text half has, as a folder or a hub name; None is the LLM's own."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return QFormer(encoder.width, width, self.options, "whole" if self.options.text else None)

    def layout(self, kind: str, tokens: int) -> Layout:
        """Soft tokens alone, with no line break behind them."""
        return Layout(tokens)

    def reading(self) -> Reading | None:
        if not self.options.text:
            return None
        return Reading(self.options.length, "answer", self.options.tokenizer)

    def birth(self, model: VLM) -> None:
        """Take weights over, where some are named.

        Raises:
            ConfigError: the text half cannot hold the vocabulary that it reads, and the word that starts a caption.
        """
        if self.options.text:
            parts.check_vocabulary(model.llm, self.options.tokenizer, self.options.vocabulary, own=1)
        qformer_weights.begin(model, self.options.qformer, parts.tensors)
