"""Fewer, calmer tokens around another connector: pooling to a grid, normalised input, output at the LLM's scale."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.connectors import Connector
from isthmus.connectors.mlp import MLP
from isthmus.encoders import Encoder
from isthmus.types import ConfigError, Context, Features


class Pool(Connector):
    """Averages a grid of S tokens into `side` x `side` cells before the inner connector.

    Args:
        inner: the connector that reads the pooled tokens.
        grid: (rows, columns) of the encoder's tokens.
        side: rows and columns after pooling.

    Raises:
        ConfigError: the grid is smaller than `side`.
    """

    cells_QS: Tensor

    def __init__(self, inner: Connector, grid: tuple[int, int], side: int):
        super().__init__()
        if side > min(grid):
            raise ConfigError(f"cannot pool a {grid[0]}x{grid[1]} grid to {side}x{side}", f"use pool <= {min(grid)}")
        self.inner, self.side = inner, side
        one_hot = torch.eye(grid[0] * grid[1]).unflatten(1, grid)
        # One row of weights per cell: a matrix product pools faster than a window sliding over strided channels.
        cells = F.adaptive_avg_pool2d(one_hot, side).flatten(1).T.contiguous()
        self.register_buffer("cells_QS", cells, persistent=False)

    def tokens(self, s: int) -> int:
        return self.inner.tokens(self.side**2)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, rows * columns, E] -> y of the inner connector for [N, side * side, E]."""
        pooled = self.cells_QS.to(features.x_NSE.dtype) @ features.x_NSE
        return self.inner(replace(features, x_NSE=pooled, grid=(self.side, self.side)), context)


class Normalised(Connector):
    """LayerNorm before the inner connector, and RMS-normalised output at a learned scale around a learned centre.

    A random projector's output may be many times larger or smaller than word embeddings, and a frozen LLM then
    sees noise. At birth `centre` is the mean of the LLM's embedding table and `scale` the root mean square of what
    is around it (see `LLaVA.birth`), so that vectors start where words are.

    Args:
        inner: the connector between the two.
        width: E, the width of its input.
        out: D, the width of its output.
    """

    def __init__(self, inner: Connector, width: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))
        self.centre = nn.Parameter(torch.zeros(out))

    def tokens(self, s: int) -> int:
        return self.inner.tokens(s)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D] with root mean square `scale` around `centre`."""
        y_NQD = self.inner(replace(features, x_NSE=self.norm(features.x_NSE)), context)
        return F.rms_norm(y_NQD, y_NQD.shape[-1:]) * self.scale + self.centre


def projector(encoder: Encoder, out: int, depth: int, pool: int | None, normalise: bool) -> Connector:
    """LLaVA's projector of `depth` Linears, with this file's additions where they are wanted."""
    joint: Connector = MLP(encoder.width, out, depth)
    if normalise:
        joint = Normalised(joint, encoder.width, out)
    return Pool(joint, encoder.grid, pool) if pool else joint


@torch.no_grad()
def settle(connectors: nn.Module, words_VD: Tensor) -> None:
    """Let every `Normalised` inside put its output where the words of an embedding table are."""
    words_VD = words_VD.float()
    centre_D = words_VD.mean(0)
    for module in connectors.modules():
        if isinstance(module, Normalised):
            module.centre.copy_(centre_D)
            module.scale.fill_((words_VD - centre_D).square().mean().sqrt())
