"""LLaVA: encoder tokens through a linear layer or a small MLP into the LLM's input.

Liu et al. 2023, arXiv 2304.08485 (linear) and arXiv 2310.03744 (two-layer MLP).
Official code: github.com/haotian-liu/LLaVA.

Differs: `pool`, `normalise` and `words` are ours, off by default; the embedded recipe uses the first two, since a
135 M LLM on a laptop pays for every image token, and the demo the third, since so small an LLM hardly learns to read
vectors that are not nearly words (docs/log.md). The published LLaVA-1.5 letter-boxes pictures in both stages; the
authors' first stage crops them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from isthmus import sites
from isthmus.aligner import Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.pool import projector, settle
from isthmus.encoders import Encoder

if TYPE_CHECKING:
    from isthmus.model import VLM


class LLaVA(Aligner):
    """Projects every encoder token; the projected tokens stand in the LLM's input in place of the image."""

    name = "llava"
    family = "converter"
    also = "data"

    class Options(Frozen):
        projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
        """`linear` is LLaVA, `mlp2x_gelu` is LLaVA-1.5."""
        pool: int | None = Field(None, ge=1)
        """Average the encoder's grid to pool x pool tokens first."""
        normalise: bool = False
        """LayerNorm before, and output where the LLM's embeddings are."""
        words: float | None = Field(None, gt=0)
        """Temperature at which output leans towards the words that it is like, after AlignVLM; needs `normalise`."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        depth = 1 if self.options.projector == "linear" else 2
        return projector(encoder, width, depth, self.options.pool, self.options.normalise, self.options.words)

    def birth(self, model: VLM) -> None:
        settle(model.connectors, sites.words(model.llm))
