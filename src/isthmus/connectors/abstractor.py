"""Visual abstractor: learned queries summarise a picture in a few layers, and one learned vector ends it.

Ye et al. 2023, arXiv 2304.14178 (mPLUG-Owl). Official code: github.com/X-PLUG/mPLUG-Owl, `modeling_mplug_owl.py`.

Differs: `width` narrows wide encoders first and is ours; pictures that differ in size are read without their padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.connectors import Connector
from isthmus.types import Context, Features


class GatedMLP(nn.Module):
    """silu(w1 x) * w3 x, normalised, then w2."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, inner), nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner, eps=1e-6)
        self.w2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.w2(self.norm(F.silu(self.w1(x)) * self.w3(x)))


class Layer(nn.Module):
    """Queries read themselves and the picture. The residual is the normalised query, as in the authors' code."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.norm_queries, self.norm_x, self.norm_feed = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = GatedMLP(width, inner)

    def forward(self, queries_NQI: Tensor, x_NSI: Tensor, padding: Tensor | None) -> Tensor:
        """queries [N, Q, I], x [N, S, I] -> [N, Q, I]; `padding` [N, Q + S] is True where nothing is read."""
        asking = self.norm_queries(queries_NQI)
        read = torch.cat([asking, self.norm_x(x_NSI)], 1)
        seen, _ = self.attention(asking, read, read, key_padding_mask=padding, need_weights=False)
        queries_NQI = asking + seen
        return queries_NQI + self.feed(self.norm_feed(queries_NQI))


class Abstractor(Connector):
    """`queries` vectors of the LLM's width, and the end-of-picture vector behind them.

    Args:
        width: E, the encoder's width.
        out: D, the LLM's width.
        queries: learned queries; Q is one more.
        depth: number of layers.
        heads: attention heads.
        inner: width inside the feed-forward network.
        narrow: I, the width of queries and layers; None is the encoder's.
    """

    def __init__(
        self,
        width: int,
        out: int,
        queries: int = 64,
        depth: int = 6,
        heads: int = 16,
        inner: int = 4096,
        narrow: int | None = None,
    ):
        super().__init__()
        own = narrow or width
        self.narrow = nn.Linear(width, narrow) if narrow else nn.Identity()
        self.queries = nn.Parameter(torch.empty(queries, own))
        self.layers = nn.ModuleList(Layer(own, inner, heads) for _ in range(depth))
        self.project = nn.Linear(own, out)
        self.end = nn.Parameter(torch.empty(1, out))
        for vectors in (self.queries, self.end):
            nn.init.trunc_normal_(vectors, std=0.02)

    def tokens(self, s: int) -> int:
        return len(self.queries) + 1

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, queries + 1, D]; the last vector is the same for every picture."""
        x_NSI = self.narrow(features.x_NSE)
        y_NQI = self.queries.expand(x_NSI.shape[0], -1, -1)
        is_real = features.real_NS
        padding = None if is_real is None else F.pad(~is_real, (len(self.queries), 0), value=False)
        for layer in self.layers:
            y_NQI = layer(y_NQI, x_NSI, padding)
        return torch.cat([self.project(y_NQI), self.end.expand(x_NSI.shape[0], -1, -1)], 1)
