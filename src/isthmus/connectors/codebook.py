"""Codes of pictures and a head that tells them: residual quantisation of features, and a transformer over its levels.

Residual quantisation: Lee et al. 2022, arXiv 2203.01941. ASVR, which uses it: Wang et al. 2025, arXiv 2506.09040.
Official code: github.com/AlenjandroWang/ASVR.

Every level has a codebook, and a code of it names the vector nearest to what the levels before it have left over. The
head reads a state of the LLM and then, level by level, the sum of the vectors named so far.

Differs:
    - codebooks are fitted to the encoder's own features (`prepare.codes`); the release has a tokenizer of its own, with
      weights from a training for itself;
    - in the head, the state in front of a feed-forward's norm goes past it; in the release the normed one does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.connectors import Connector
from isthmus.graft import arithmetic
from isthmus.types import ConfigError, Context, Features

HEAD_WIDTH = 128
"""Channels of an attention head between levels, as released."""
DISTANCES = 1 << 26
"""Distances from codes that are in memory at a time."""


class Codebook(nn.Module):
    """Levels of vectors that are fitted once and never trained.

    Args:
        levels: L.
        size: K, vectors in each level.
        width: E of the features.
    """

    books_LKE: Tensor
    centre_E: Tensor
    spread_E: Tensor

    def __init__(self, levels: int, size: int, width: int):
        super().__init__()
        self.register_buffer("books_LKE", torch.zeros(levels, size, width))
        self.register_buffer("centre_E", torch.zeros(width))
        self.register_buffer("spread_E", torch.ones(width))

    @property
    def fitted(self) -> bool:
        return self.books_LKE.is_meta or bool(self.books_LKE.any())

    def even(self, x: Tensor) -> Tensor:
        """Features [..., E] in float32 with every channel at mean 0 and deviation 1 over the pictures of the fit."""
        return (x.float() - self.centre_E.float()) / self.spread_E.float()

    def forward(self, x_ME: Tensor) -> Tensor:
        """Features [M, E] -> codes [M, L], in float32 whatever surrounds it: bfloat16 would mistake near ones."""
        with arithmetic(x_ME.float()):
            rest_ME, codes = self.even(x_ME), []
            for book_KE in self.books_LKE.float():
                codes.append(nearest(rest_ME, book_KE))
                rest_ME = rest_ME - book_KE[codes[-1]]
        return torch.stack(codes, -1)

    def sums(self, codes_ML: Tensor) -> Tensor:
        """What the codes of a level and of those before it add up to, [M, L, E]."""
        picked = [book_KE[code_M] for book_KE, code_M in zip(self.books_LKE, codes_ML.unbind(-1))]
        return torch.stack(picked, 1).cumsum(1)


def nearest(x_ME: Tensor, book_KE: Tensor) -> Tensor:
    """The row of `book_KE` at the least distance from each row of `x_ME`, [M]; some rows at a time."""
    size_K = book_KE.square().sum(-1)
    parts = x_ME.split(max(1, DISTANCES // len(book_KE)))
    return torch.cat([(size_K - 2 * part_ME @ book_KE.T).argmin(-1) for part_ME in parts])


class Level(nn.Module):
    """Attention over the levels up to one's own, then a feed-forward that each level has for itself."""

    def __init__(self, width: int, levels: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = nn.MultiheadAttention(width, max(1, width // HEAD_WIDTH), batch_first=True)
        self.norm_inner = nn.RMSNorm(width)
        self.enter = nn.Parameter(torch.randn(levels, width, 2 * width) * width**-0.5)
        self.leave = nn.Parameter(torch.randn(levels, 2 * width, width) * (2 * width) ** -0.5)

    def forward(self, x_MLW: Tensor) -> Tensor:
        levels = x_MLW.shape[1]
        hidden_LL = torch.ones(levels, levels, dtype=torch.bool, device=x_MLW.device).triu(1)
        normed_MLW = self.norm(x_MLW)
        x_MLW = x_MLW + self.attention(normed_MLW, normed_MLW, normed_MLW, attn_mask=hidden_LL, need_weights=False)[0]
        inside = F.gelu(torch.einsum("mlw,lwi->mli", self.norm_inner(x_MLW), self.enter))
        return x_MLW + torch.einsum("mli,liw->mlw", inside, self.leave)


class Teller(nn.Module):
    """ASVR's visual head: from a state to the codes of its place, one level after another.

    Args:
        width: D, the LLM's width.
        codes: E of the codebook's vectors.
        inner: W of the head; a multiple of 128, or less than 256.
        levels: L.
        size: K.
        depth: layers.

    Raises:
        ConfigError: W does not divide into heads.
    """

    def __init__(self, width: int, codes: int, inner: int, levels: int, size: int, depth: int):
        super().__init__()
        if inner % max(1, inner // HEAD_WIDTH):
            raise ConfigError(f"a head of width {inner} does not divide into heads of {HEAD_WIDTH}", "use a multiple")
        self.enter = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner))
        self.read = nn.Linear(codes, inner)
        self.layers = nn.ModuleList(Level(inner, levels) for _ in range(depth))
        self.norm = nn.RMSNorm(inner)
        self.answers = nn.ModuleList(nn.Linear(inner, size) for _ in range(levels))

    def forward(self, states_MD: Tensor, sums_MLE: Tensor) -> Tensor:
        """States and the sums that the right codes make (`Codebook.sums`) -> logits [M, L, K]; a level reads no sum of
        its own."""
        dtype = self.read.weight.dtype
        begun_MW, told_MLW = self.enter(states_MD.to(dtype)), self.read(sums_MLE[:, :-1].to(dtype))
        x_MLW = torch.cat([begun_MW[:, None], told_MLW], 1)
        for layer in self.layers:
            x_MLW = layer(x_MLW)
        x_MLW = self.norm(x_MLW)
        return torch.stack([answer(x_MW) for answer, x_MW in zip(self.answers, x_MLW.unbind(1))], 1)


class Coded(Connector):
    """A connector as it is, beside which features become codes and states tell them.

    Args:
        inner: makes the vectors.
        of: the encoder's features that codes are of: `features`, or the name of a tap.
        codebook: None carries no codes and no head.
        teller: the head.
    """

    def __init__(self, inner: Connector, of: str, codebook: Codebook | None, teller: Teller | None):
        super().__init__()
        self.inner, self.of, self.codebook, self.teller = inner, of, codebook, teller

    def tokens(self, s: int) -> int:
        return self.inner.tokens(s)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D] of the inner connector."""
        return self.inner(features, context)

    def seen(self, features: Features) -> Tensor:
        """What codes are made of, one vector per place of the inner connector's tokens: [N, Q, E].

        Raises:
            ConfigError: what has to be brought to those places is no grid, or they are none.
        """
        x_NSE = features.x_NSE if self.of == "features" else features.taps[self.of]
        count = self.tokens(features.x_NSE.shape[1])
        if x_NSE.shape[1] == count:
            return x_NSE
        grid = _places(x_NSE.shape[1], features.grid if self.of == "features" else None)
        x_NEHW = x_NSE.mT.unflatten(2, grid)
        return F.adaptive_avg_pool2d(x_NEHW.float(), _places(count, features.grid)).flatten(2).mT

    def codes(self, features: Features) -> Tensor:
        """x [N, S, E] -> codes [N, Q, L]."""
        assert self.codebook is not None
        x_NQE = self.seen(features)
        return self.codebook(x_NQE.flatten(0, 1)).unflatten(0, x_NQE.shape[:2])


def _places(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of so many vectors: those of `grid` if it has as many, else a square's."""
    if grid is not None and grid[0] * grid[1] == count:
        return grid
    side = math.isqrt(count)
    if side * side != count:
        raise ConfigError(
            f"{count} vectors of a picture are neither a square nor the encoder's grid",
            "set tokenizer: features, or class_token: drop where the encoder keeps one",
        )
    return side, side
