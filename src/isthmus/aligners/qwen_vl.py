"""Qwen-VL: a single cross-attention that knows places in 2-D compresses any grid to 256 tokens in the LLM's input.

Bai et al. 2023, arXiv 2308.12966 (Qwen-VL). Official code: github.com/QwenLM/Qwen-VL.

Differs:
    - `<img>`, `<ref>`, `<box>` and their ends are written with the LLM's own tokens, and pictures are not numbered;
    - `normalise` is ours, off by default: LayerNorm before, and output where the LLM's embeddings are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from isthmus import sites
from isthmus.aligner import Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.pool import Normalised, settle, whole_grid
from isthmus.connectors.position_aware import PositionAware
from isthmus.data.boxes import Thousandths
from isthmus.encoders import Encoder
from isthmus.types import Layout

if TYPE_CHECKING:
    from isthmus.model import VLM


class QwenVL(Aligner):
    """`side` x `side` queries stand in the LLM's input in place of the picture, whatever its resolution."""

    name = "qwen_vl"
    family = "perceiver"

    class Options(Frozen):
        side: int = Field(16, ge=1)
        """Rows and columns of the queries; 16 gives 256 tokens."""
        heads: int = Field(32, ge=1)
        positions: bool = True
        """False is the ablation without places in queries and keys."""
        normalise: bool = False

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        options, grid = self.options, whole_grid(encoder)
        joint: Connector = PositionAware(encoder.width, width, grid, options.side, options.heads, options.positions)
        return Normalised(joint, encoder.width, width) if options.normalise else joint

    def layout(self, kind: str, tokens: int) -> Layout:
        return Layout(tokens, before="<img>", after="</img>\n")

    def boxes(self) -> Thousandths:
        return Thousandths()

    def birth(self, model: VLM) -> None:
        settle(model.connectors, sites.words(model.llm))
