"""Shikra: LLaVA's joint whose questions and answers hold coordinates as ordinary decimals.

Chen et al. 2023, arXiv 2306.15195 (Shikra). Official code: github.com/shikras/shikra.

Differs: `pool` and `normalise` are ours, off by default, as in LLaVA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from isthmus import sites
from isthmus.aligner import Aligner
from isthmus.connectors import Connector
from isthmus.connectors.pool import Projected, settle
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

    class Options(Projected):
        projector: Literal["linear", "mlp2x_gelu"] = "linear"
        digits: int = Field(3, ge=1)
        """Decimals of a coordinate."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        return self.options.connector(encoder, width)

    def layout(self, kind: str, tokens: int) -> Layout:
        return Layout(tokens, before=START, after=END)

    def boxes(self) -> Decimals:
        return Decimals(digits=self.options.digits)

    def new_tokens(self) -> tuple[str, ...]:
        return (START, END)

    def birth(self, model: VLM) -> None:
        settle(model.connectors, sites.words(model.llm))
