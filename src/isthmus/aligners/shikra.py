"""Shikra: LLaVA's joint whose questions and answers hold coordinates as ordinary decimals.

Chen et al. 2023, arXiv 2306.15195 (Shikra). Official code: github.com/shikras/shikra.

Differs: `pool` and `normalise` are ours, off by default, as in LLaVA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from isthmus import sites
from isthmus.aligner import Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.pool import projector, settle
from isthmus.data.boxes import Decimals
from isthmus.encoders import Encoder
from isthmus.types import Layout

if TYPE_CHECKING:
    from isthmus.model import VLM

START, END = "<im_start>", "<im_end>"


class Shikra(Aligner):
    """Projected encoder tokens between two new words; regions are `[x1,y1,x2,y2]` with three decimals."""

    name = "shikra"
    family = "converter"
    also = "data"

    class Options(Frozen):
        projector: Literal["linear", "mlp2x_gelu"] = "linear"
        pool: int | None = Field(None, ge=1)
        """Average the encoder's grid to pool x pool tokens first."""
        normalise: bool = False
        """LayerNorm before, and output where the LLM's embeddings are."""
        digits: int = Field(3, ge=1)
        """Decimals of a coordinate."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        depth = 1 if self.options.projector == "linear" else 2
        return projector(encoder, width, depth, self.options.pool, self.options.normalise)

    def layout(self, kind: str, tokens: int) -> Layout:
        return Layout(tokens, before=START, after=END)

    def boxes(self) -> Decimals:
        return Decimals(digits=self.options.digits)

    def new_tokens(self) -> tuple[str, ...]:
        return (START, END)

    def birth(self, model: VLM) -> None:
        settle(model.connectors, sites.words(model.llm))
