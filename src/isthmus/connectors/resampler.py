"""Perceiver resampler: a fixed number of learned latents reads any number of encoder tokens, Flamingo's connector.

Alayrac et al. 2022, arXiv 2204.14198 (Flamingo); Awadalla et al. 2023, arXiv 2308.01390 (OpenFlamingo).
Official code: github.com/mlfoundations/open_flamingo, `src/helpers.py`.

Differs: no embedding per frame (pictures only so far); `inner` narrows wide encoders first and is ours; pictures that
differ in size are read without their padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.connectors import Connector
from isthmus.types import Context, Features


class CrossAttention(nn.Module):
    """Multi-head attention of one stream to another, without biases, as wide inside as heads * head_width.

    Args:
        width: X, the width of what asks, and of the result.
        read: Y, the width of what is read.
        heads: number of heads.
        head_width: width of one head.
    """

    def __init__(self, width: int, read: int, heads: int, head_width: int):
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.q = nn.Linear(width, inner, bias=False)
        self.kv = nn.Linear(read, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x_NQX: Tensor, y_NSY: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x [N, Q, X], y [N, S, Y] -> [N, Q, X]; `allowed` broadcasts to [N, heads, Q, S], True where q may see s."""
        k_NSI, v_NSI = self.kv(y_NSY).chunk(2, -1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q(x_NQX), k_NSI, v_NSI))
        return self.out(F.scaled_dot_product_attention(q, k, v, allowed).transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """LayerNorm, then four times as wide and back with GELU between, without biases."""
    wide = nn.Linear(width, 4 * width, bias=False)
    return nn.Sequential(nn.LayerNorm(width), wide, nn.GELU(), nn.Linear(4 * width, width, bias=False))


class Layer(nn.Module):
    """Latents read the tokens and themselves, then pass a feed-forward network; both with a residual."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.norm_x, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CrossAttention(width, width, heads, head_width)
        self.feed = feed_forward(width)

    def forward(self, latents_NQI: Tensor, x_NSI: Tensor, allowed: Tensor | None) -> Tensor:
        """latents [N, Q, I], x [N, S, I] -> [N, Q, I]."""
        asking = self.norm_latents(latents_NQI)
        read = torch.cat([self.norm_x(x_NSI), asking], 1)
        latents_NQI = latents_NQI + self.attention(asking, read, allowed)
        return latents_NQI + self.feed(latents_NQI)


class Perceiver(Connector):
    """`latents` vectors of the resampler's width for every medium, whatever its size.

    Args:
        width: E, the encoder's width.
        latents: Q.
        depth: number of layers.
        heads: attention heads.
        head_width: width of one head.
        inner: I, the width inside and of the result; None is the encoder's.
    """

    def __init__(
        self,
        width: int,
        latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_width: int = 64,
        inner: int | None = None,
    ):
        super().__init__()
        self.width = inner or width
        self.narrow = nn.Linear(width, inner) if inner else nn.Identity()
        self.latents = nn.Parameter(torch.randn(latents, self.width))
        self.layers = nn.ModuleList(Layer(self.width, heads, head_width) for _ in range(depth))
        self.norm = nn.LayerNorm(self.width)

    def tokens(self, s: int) -> int:
        return len(self.latents)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, I]."""
        x_NSI = self.narrow(features.x_NSE)
        latents_NQI = self.latents.expand(x_NSI.shape[0], -1, -1)
        is_real = features.real_NS
        allowed = None if is_real is None else F.pad(is_real, (0, len(self.latents)), value=True)[:, None, None]
        for layer in self.layers:
            latents_NQI = layer(latents_NQI, x_NSI, allowed)
        return self.norm(latents_NQI)
