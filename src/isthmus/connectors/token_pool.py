"""ViCToR's token pool: while it trains, most vectors of a picture are replaced by learned ones that match them.

Xie et al. 2024, arXiv 2410.14332. Official code: github.com/deepglint/Victor.

Differs: the matching is our own shortest augmenting paths, since nothing else here needs scipy; vectors are replaced
where the pool trains, so that a stage that leaves it out of `train` reads pictures whole.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.connectors import Connector
from isthmus.types import ConfigError, Context, Features


class TokenPool(Connector):
    """Vectors of length 1, a share of which are those of a pool.

    Args:
        inner: makes the vectors.
        width: D, the LLM's width.
        size: vectors in the pool; None for no pool.
        share: of a picture's vectors that are replaced, drawn anew for each.
        most: vectors that a picture can have.

    Raises:
        ConfigError: the pool has fewer vectors than may be replaced at once.
    """

    def __init__(self, inner: Connector, width: int, size: int | None, share: float, most: int):
        super().__init__()
        if size is not None and int(share * most) > size:
            raise ConfigError(f"{int(share * most)} vectors of a picture want one each of {size}", "enlarge the pool")
        self.inner, self.share = inner, share
        self.pool = None if size is None else nn.Parameter(torch.randn(size, width))

    def tokens(self, s: int) -> int:
        return self.inner.tokens(s)

    def whole(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D], each vector of length 1, none replaced."""
        return F.normalize(self.inner(features, context), dim=-1)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D]; while the pool trains, a share of each picture's vectors are the pool's."""
        y_NQD = self.whole(features, context)
        if self.pool is None or not (self.training and self.pool.requires_grad):
            return y_NQD
        lengths = [y_NQD.shape[1]] * len(y_NQD)
        if features.lengths_N is not None:
            lengths = [self.tokens(int(s)) for s in features.lengths_N]
        return torch.stack([self._replaced(y_QD, length, self.pool) for y_QD, length in zip(y_NQD, lengths)])

    def _replaced(self, y_QD: Tensor, length: int, pool_PD: Tensor) -> Tensor:
        """One picture's vectors, of which the first `length` are real."""
        chosen = torch.randperm(length, device=y_QD.device)[: int(self.share * length)]
        cost_KP = torch.cdist(y_QD[chosen].detach().float(), pool_PD.detach().float())
        if cost_KP.is_meta:  # a plan counts operations and has no numbers to match
            matched = torch.arange(len(chosen), device="meta")
        else:
            matched = torch.from_numpy(match(cost_KP.cpu().double().numpy())).to(y_QD.device)
        return y_QD.index_put((chosen,), pool_PD[matched].to(y_QD.dtype))


def match(cost_KP: np.ndarray) -> np.ndarray:
    """For every row a column of its own, the costs together as small as can be; K <= P. The columns, [K].

    The Hungarian method in the form of Jonker and Volgenant (1987): row after row is added by the cheapest path along
    which earlier rows change their columns, under prices that keep reduced costs from being negative. Costs that are
    not finite have no least sum: the first columns.
    """
    rows, columns = cost_KP.shape
    if not np.isfinite(cost_KP).all():
        return np.arange(rows)
    row_of = np.full(columns, -1)
    row_price, price = np.zeros(rows), np.zeros(columns)
    for new in range(rows):
        distance, before = np.full(columns, np.inf), np.full(columns, -1)
        done = np.zeros(columns, dtype=bool)
        row, last, reached = new, -1, 0.0
        while row >= 0:
            through = reached + cost_KP[row] - row_price[row] - price
            better = ~done & (through < distance)
            distance[better], before[better] = through[better], last
            last = int(np.where(done, np.inf, distance).argmin())
            reached, row = distance[last], row_of[last]
            done[last] = True
        passed = np.flatnonzero(done & (row_of >= 0))
        row_price[row_of[passed]] += reached - distance[passed]
        row_price[new] += reached
        price[done] -= reached - distance[done]
        while last >= 0:
            row_of[last] = new if before[last] < 0 else row_of[before[last]]
            last = before[last]
    found = np.empty(rows, dtype=np.int64)
    taken = np.flatnonzero(row_of >= 0)
    found[row_of[taken]] = taken
    return found
