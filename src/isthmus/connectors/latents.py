"""Latent queries that read a picture and themselves in a single attention: Kosmos-2's "xconnector".

Peng et al. 2023, arXiv 2306.14824 (Kosmos-2). Official code: github.com/microsoft/unilm, `kosmos-2/unilm/models/
connector.py`.

Differs: `grid` tells keys and values their place in 2-D and is ours, for encoders that do not know it; pictures that
differ in size are read without their padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.connectors import Connector
from isthmus.connectors.position_aware import resized, sine_cosine
from isthmus.types import ConfigError, Context, Features


class Latents(Connector):
    """`queries` vectors of the LLM's width; there is no residual and no feed-forward network.

    Args:
        width: E, the encoder's width.
        out: D, the LLM's width.
        queries: learned queries.
        heads: attention heads.
        grid: (rows, columns) of the encoder's tokens, where these are to know their place.

    Raises:
        ConfigError: the width does not divide.
    """

    place_SD: Tensor | None

    def __init__(self, width: int, out: int, queries: int = 64, heads: int = 32, grid: tuple[int, int] | None = None):
        super().__init__()
        if out % heads or (grid is not None and out % 4):
            raise ConfigError(f"width {out} does not divide into {heads} heads and 4 waves", "set `heads` to a divisor")
        self.project = nn.Linear(width, out)
        self.queries = nn.Parameter(torch.randn(queries, out))
        self.attention = nn.MultiheadAttention(out, heads, batch_first=True)
        table = None
        if grid is not None:
            # As large as what stands at a place: a normalised input through a newborn Linear has a variance of 1/3.
            table = resized(sine_cosine(out, max(grid)), grid).flatten(0, 1) * math.sqrt(2 / 3)
        self.register_buffer("place_SD", table, persistent=False)

    def tokens(self, s: int) -> int:
        return len(self.queries)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D]."""
        x_NSD = self.project(features.x_NSE)
        if self.place_SD is not None:
            x_NSD = x_NSD + self.place_SD
        asking_NQD = self.queries.expand(x_NSD.shape[0], -1, -1)
        read = torch.cat([x_NSD, asking_NQD], 1)
        is_real = features.real_NS
        padding = None if is_real is None else F.pad(~is_real, (0, len(self.queries)), value=False)
        return self.attention(asking_NQD, read, read, key_padding_mask=padding, need_weights=False)[0]
