"""ViCToR: LLaVA's joint with vectors of length 1, a pool that replaces most of them, and a head that tells them again.

Xie et al. 2024, arXiv 2410.14332. Official code: github.com/deepglint/Victor. The parts are in `connectors.token_pool`
and `objectives.victor`.

Differs: `grid` is ours, off by default, for small machines.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from isthmus.aligner import Aligner
from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.pool import projector
from isthmus.connectors.token_pool import TokenPool
from isthmus.encoders import Encoder


class ViCToR(Aligner):
    """A projector on the unit sphere; the pool is `connectors.*.pool`, the head `heads.tell`."""

    name = "victor"
    family = "converter"
    also = "data"

    class Options(Frozen):
        projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
        size: int | None = Field(2048, ge=1)
        """Vectors in the pool; None carries neither pool nor head, which training needs and answering does not."""
        share: float = Field(0.75, gt=0, lt=1)
        """Of a picture's vectors that are replaced while the pool trains."""
        grid: int | None = Field(None, ge=1)
        """Average the encoder's grid to grid x grid tokens first."""

    def connector(self, kind: str, encoder: Encoder, width: int) -> Connector:
        depth = 1 if self.options.projector == "linear" else 2
        inner = projector(encoder, width, depth, self.options.grid, False)
        return TokenPool(inner, width, self.options.size, self.options.share, inner.tokens(encoder.tokens))

    def heads(self, width: int) -> dict[str, nn.Module]:
        """From states to the vectors that stood at their places."""
        return {"tell": nn.Linear(width, width)} if self.options.size else {}
