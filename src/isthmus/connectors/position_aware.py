"""Position-aware resampler: one cross-attention in which queries and keys, not values, know their place in 2-D.

Bai et al. 2023, arXiv 2308.12966 (Qwen-VL). Official code: github.com/QwenLM/Qwen-VL and its modelling files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.connectors import Connector
from isthmus.types import ConfigError, Context, DataError, Features


def sine_cosine(width: int, side: int) -> Tensor:
    """A fixed table of places in a square grid, [side, side, width]: the column's sines and cosines, then the row's."""
    place, rate = torch.arange(side).float(), 10000.0 ** -(torch.arange(width // 4) / (width / 4))
    angle = place[:, None] * rate
    one_axis = torch.cat([angle.sin(), angle.cos()], -1)
    return torch.cat([one_axis.expand(side, -1, -1), one_axis[:, None].expand(-1, side, -1)], -1)


def resized(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The table [rows, columns, width] for another grid, bicubically."""
    if tuple(table.shape[:2]) == grid:
        return table
    return F.interpolate(table.permute(2, 0, 1)[None], grid, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)


class PositionAware(Connector):
    """`side` x `side` learned queries read the encoder's grid once; there is no residual and no feed-forward network.

    Args:
        width: E, the encoder's width.
        out: D, the LLM's width, a multiple of 4 and of `heads`.
        grid: (rows, columns) of the encoder's tokens.
        side: rows and columns of the queries.
        heads: attention heads.
        positions: False leaves the places out (an ablation).

    Raises:
        ConfigError: the width does not divide.
    """

    place_QD: Tensor
    place_SD: Tensor

    def __init__(
        self, width: int, out: int, grid: tuple[int, int], side: int = 16, heads: int = 32, positions: bool = True
    ):
        super().__init__()
        if out % 4 or out % heads:
            raise ConfigError(f"width {out} does not divide into {heads} heads and 4 waves", "set `heads` to a divisor")
        self.project = nn.Linear(width, out, bias=False)
        self.queries = nn.Parameter(torch.empty(side**2, out))
        self.norm_queries, self.norm_x, self.norm_out = (nn.LayerNorm(out, eps=1e-6) for _ in range(3))
        self.attention = nn.MultiheadAttention(out, heads, batch_first=True)
        self.out = nn.Linear(out, out, bias=False)
        for weight in (self.project.weight, self.queries, self.attention.out_proj.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.normal_(self.out.weight, std=out**-0.5)
        table = sine_cosine(out, side) * positions
        self.register_buffer("place_QD", table.flatten(0, 1), persistent=False)
        self.register_buffer("place_SD", resized(table, grid).flatten(0, 1), persistent=False)

    def tokens(self, s: int) -> int:
        return len(self.queries)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D].

        Raises:
            DataError: the pictures differ in size, so that S is no grid.
        """
        if features.lengths_N is not None:
            raise DataError("pictures that differ in size have no common grid", "use an encoder of square pictures")
        x_NSD = self.norm_x(self.project(features.x_NSE))
        asking_NQD = (self.norm_queries(self.queries) + self.place_QD.to(x_NSD.dtype)).expand(x_NSD.shape[0], -1, -1)
        seen_NQD, _ = self.attention(asking_NQD, x_NSD + self.place_SD.to(x_NSD.dtype), x_NSD, need_weights=False)
        return self.out(self.norm_out(seen_NQD))
