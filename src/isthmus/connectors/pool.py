"""Fewer, calmer tokens around another connector: pooled to a grid, normalised, leaning towards the LLM's words.

The last is after AlignVLM (Masry et al. 2025, arXiv 2502.01341), whose connector has a matrix of its own for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.connectors.mlp import MLP
from isthmus.encoders import Encoder
from isthmus.types import ConfigError, Context, DataError, Features


def whole_grid(encoder: Encoder) -> tuple[int, int]:
    """(rows, columns) of the encoder's tokens, all of which stand in them.

    Raises:
        ConfigError: others are kept beside the grid.
    """
    rows, columns = encoder.grid
    if encoder.tokens != rows * columns:
        raise ConfigError(
            f"the encoder's {encoder.tokens} tokens are no grid: a class token stays beside {rows}x{columns} patches",
            "set encoder.class_token to drop",
        )
    return rows, columns


def pooled(inner: Connector, encoder: Encoder, side: int | None) -> Connector:
    """The connector behind a `Pool` of the encoder's grid to `side` x `side`; as it is where `side` is None.

    Raises:
        ConfigError: the encoder's tokens are no grid, or one smaller than `side`.
    """
    return inner if side is None else Pool(inner, whole_grid(encoder), side)


class Pool(Connector):
    """Averages a grid of S tokens into `side` x `side` cells before the inner connector.

    Args:
        inner: the connector that reads the pooled tokens.
        grid: (rows, columns) of the encoder's tokens.
        side: rows and columns after pooling.

    Raises:
        ConfigError: the grid is smaller than `side`.
    """

    multiplies_first = True
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
        """x [N, rows * columns, E] -> y of the inner connector for [N, side * side, E].

        Raises:
            DataError: the pictures differ in size, so that their tokens are no such grid.
        """
        if features.lengths_N is not None:
            raise DataError(
                "pictures that differ in size have no common grid to pool",
                "use an encoder of square pictures, or leave the pooling out",
            )
        x_NQE = self.cells_QS.to(features.x_NSE.dtype) @ features.x_NSE
        return self.inner(replace(features, x_NSE=x_NQE, grid=(self.side, self.side)), context)


class Normalised(Connector):
    """LayerNorm before the inner connector, and RMS-normalised output at a learned scale around a learned centre.

    A random projector's output may be many times larger or smaller than word embeddings, and a frozen LLM then
    sees noise. At birth `centre` is the mean of the LLM's embedding table and `scale` the root mean square of what
    is around it (see `LLaVA.birth`), so that vectors start where words are.

    With `words` every output also leans towards the words that it resembles: see `towards_words`.

    Args:
        inner: the connector between the two.
        width: E, the width of its input.
        out: D, the width of its output.
        words: the temperature of that leaning; None leaves it out.
    """

    def __init__(self, inner: Connector, width: int, out: int, words: float | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.words = inner, words
        self.scale = nn.Parameter(torch.ones(()))
        self.centre = nn.Parameter(torch.zeros(out))

    def tokens(self, s: int) -> int:
        return self.inner.tokens(s)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D] with root mean square `scale` around `centre`."""
        y_NQD = self.inner(replace(features, x_NSE=self.norm(features.x_NSE)), context)
        if self.words is not None:
            assert context.words is not None  # a model gives them
            y_NQD = towards_words(y_NQD, context.words().detach(), self.centre.detach(), self.words)
        return F.rms_norm(y_NQD, y_NQD.shape[-1:]) * self.scale + self.centre


def towards_words(y_NQD: Tensor, words_VD: Tensor, centre_D: Tensor, temperature: float) -> Tensor:
    """The direction of each vector plus that of the words that it is like, seen from `centre_D`; no parameters.

    The second is the mean of all words' directions, weighted by softmax(cosine / temperature): AlignVLM's connector
    (arXiv 2502.01341), whose weights come from a matrix of its own in place of cosines, and which keeps the mean
    alone. Kept beside it, the vector still tells apart what has no word. Nothing of size V x D is made.
    """
    # One cast of the table to the dtype that products have under autocast, not one for each of them.
    words_VD, centre_D = words_VD.to(y_NQD.dtype), centre_D.to(y_NQD.dtype)
    squares_V = torch.linalg.vector_norm(words_VD, dim=1).square() - 2 * (words_VD @ centre_D) + centre_D @ centre_D
    length_V = squares_V.clamp(min=1e-12).sqrt()
    y_NQD = F.normalize(y_NQD, dim=-1)
    cosine_NQV = (y_NQD @ words_VD.T - (y_NQD @ centre_D)[..., None]) / length_V
    share_NQV = (cosine_NQV / temperature).softmax(-1) / length_V
    mean_NQD = share_NQV @ words_VD - share_NQV.sum(-1, keepdim=True) * centre_D
    return y_NQD + F.normalize(mean_NQD, dim=-1)


def projector(
    encoder: Encoder, out: int, depth: int, pool: int | None, normalise: bool, words: float | None = None
) -> Connector:
    """LLaVA's projector of `depth` Linears, with this file's additions where they are wanted.

    Raises:
        ConfigError: `words` without `normalise`, to which it belongs, or a grid smaller than `pool`, or none.
    """
    if words is not None and not normalise:
        raise ConfigError("words: only normalised output can lean towards words", "set normalise: true as well")
    joint: Connector = MLP(encoder.width, out, depth)
    if normalise:
        joint = Normalised(joint, encoder.width, out, words)
    return pooled(joint, encoder, pool)


class Projected(Frozen):
    """Options of joints that project every encoder token, as LLaVA does."""

    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """`linear` is LLaVA, `mlp2x_gelu` is LLaVA-1.5."""
    pool: int | None = Field(None, ge=1)
    """Average the encoder's grid to pool x pool tokens first."""
    normalise: bool = False
    """LayerNorm before, and output where the LLM's embeddings are."""

    def connector(self, encoder: Encoder, out: int, words: float | None = None) -> Connector:
        """What these options ask for: see `projector`."""
        return projector(encoder, out, 1 if self.projector == "linear" else 2, self.pool, self.normalise, words)


@torch.no_grad()
def settle(connectors: nn.Module, words_VD: Tensor) -> None:
    """Let every `Normalised` inside put its output where the words of an embedding table are."""
    words_VD = words_VD.float()
    centre_D = words_VD.mean(0)
    for module in connectors.modules():
        if isinstance(module, Normalised):
            module.centre.copy_(centre_D)
            module.scale.fill_((words_VD - centre_D).square().mean().sqrt())
