"""A stack of Linears applied to every encoder token: LLaVA's projector.

Liu et al. 2023, arXiv 2304.08485 (one Linear) and arXiv 2310.03744 (Linear, GELU, Linear).
Official code: github.com/haotian-liu/LLaVA, `multimodal_projector/builder.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.connectors import Connector
from isthmus.types import Context, Features


class MLP(Connector):
    """`depth` Linears of the LLM's width with exact GELU between them; one token in, one token out.

    Args:
        width: E, the encoder's width.
        out: D, the LLM's width.
        depth: number of Linears; 1 is LLaVA's linear projector, 2 is LLaVA-1.5's `mlp2x_gelu`.
    """

    multiplies_first = True

    def __init__(self, width: int, out: int, depth: int = 2):
        super().__init__()
        widths = [width, *[out] * depth]
        linears = [nn.Linear(i, o) for i, o in zip(widths, widths[1:])]
        layers = [linears[0], *(layer for linear in linears[1:] for layer in (nn.GELU(), linear))]
        self.layers = nn.Sequential(*layers)

    def tokens(self, s: int) -> int:
        return s

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, S, D]."""
        return self.layers(features.x_NSE)
