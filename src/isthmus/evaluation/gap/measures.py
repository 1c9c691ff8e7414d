"""The measures of the gap: pure functions on tensors, each with its definition and its source.

Rows are items throughout: row n of `x_ND` is what a model makes of picture n, row n of `y_NE` of the words for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.types import DataError

LEAST = 4
"""Items below which the unbiased CKA is not defined."""


@dataclass(frozen=True)
class Distance:
    """Two clouds of unit vectors: how far apart their centres are, and how wide each is."""

    gap: float
    """Length of the difference between the centroids: 0 if they coincide, 2 at most."""
    cosine: float
    """Of the two centroids."""
    spread_x: float
    """Root mean square distance of the first cloud's vectors from their centroid, 0 to 1."""
    spread_y: float


def modality_gap(x_ND: Tensor, y_MD: Tensor) -> Distance:
    """The distance between the centroids of both sets, after every vector is scaled to length 1.

    Liang et al. 2022, arXiv 2203.02053 ("Mind the gap"), section 2; the spread is ours, since a distance says little
    without it: for unit vectors, spread² = 1 − |centroid|².
    """
    x_ND, y_MD = (F.normalize(z.double(), dim=-1) for z in (x_ND, y_MD))
    x_D, y_D = x_ND.mean(0), y_MD.mean(0)
    spreads = ((z - centre).square().sum(-1).mean().sqrt().item() for z, centre in ((x_ND, x_D), (y_MD, y_D)))
    return Distance((x_D - y_D).norm().item(), F.cosine_similarity(x_D, y_D, dim=0).item(), *spreads)


def linear_cka(x_ND: Tensor, y_NE: Tensor, unbiased: bool = True) -> float:
    """Linear centred kernel alignment of two representations of the same N items, whose widths may differ.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = x xᵀ and L = y yᵀ: 1 for representations that are equal up to a
    rotation and a scale. Kornblith et al. 2019, arXiv 1905.00414. Where widths exceed N, their estimate of HSIC finds
    a likeness of about sqrt(DE / ((N + D)(N + E))) in independent noise; the unbiased one (Song et al. 2012; used for
    CKA by Nguyen et al. 2020, arXiv 2010.15327), which this takes, finds none on average and may fall below 0.

    Raises:
        DataError: the sets differ in number, or there are fewer than four items.
    """
    _check(x_ND, y_NE, LEAST)
    hsic = _unbiased_hsic if unbiased else _biased_hsic
    x_ND, y_NE = (z.double() - z.double().mean(0) for z in (x_ND, y_NE))
    K_NN, L_NN = x_ND @ x_ND.T, y_NE @ y_NE.T
    own = hsic(K_NN, K_NN) * hsic(L_NN, L_NN)
    return hsic(K_NN, L_NN) / math.sqrt(own) if own > 0 else 0.0


def mutual_knn(x_ND: Tensor, y_NE: Tensor, k: int = 5) -> float:
    """The mean share of an item's k nearest neighbours in one representation that are its neighbours in the other.

    Nearest by cosine, the item itself left out: 1 for equal neighbourhoods, about k / (N − 1) for unrelated ones. Huh
    et al. 2024, arXiv 2405.07987 ("The Platonic representation hypothesis"), appendix A.

    Raises:
        DataError: the sets differ in number, or there are not more than k items.
    """
    _check(x_ND, y_NE, k + 1)
    near_x_NN, near_y_NN = (_neighbours(z, k) for z in (x_ND, y_NE))
    return (near_x_NN & near_y_NN).double().sum(1).mean().item() / k


def logit_lens(states_MD: Tensor, norm: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
    """What states from inside an LLM would say: its last norm and its head applied to them, log-probabilities [M, V].

    nostalgebraist 2020, "interpreting GPT: the logit lens" (LessWrong). Nothing is trained for it, so that early
    layers, whose coordinates differ from the last one's, can hold what it does not show.
    """
    return head(norm(states_MD)).float().log_softmax(-1)


def nearest_words(states_MD: Tensor, words_VD: Tensor) -> Tensor:
    """Cosines of states in an LLM's input with the embedding of every word, both from the words' centre, [M, V].

    At the input the lens says little, since nothing has been computed there yet; what a token stands beside says more.
    """
    centre_D = words_VD.float().mean(0)
    return F.normalize(states_MD.float() - centre_D, dim=-1) @ F.normalize(words_VD.float() - centre_D, dim=-1).T


def ranks(scores_MV: Tensor, wanted: Tensor) -> Tensor:
    """The place, from 1, of the best of the wanted ids in each row's order; what scores equally stands behind."""
    best_M1 = scores_MV[:, wanted].amax(-1, keepdim=True)
    return 1 + (scores_MV > best_M1).sum(-1)


def attention_mass(weights_BHTT: Tensor, from_B: Tensor, to_BT: Tensor) -> Tensor:
    """How much of its attention one position of each row gives to a set of positions: a share per head, [B, H]."""
    rows = torch.arange(len(weights_BHTT), device=weights_BHTT.device)
    asking_BHT = weights_BHTT[rows, :, from_B].float()
    return (asking_BHT * to_BT[:, None]).sum(-1)


def _neighbours(x_ND: Tensor, k: int) -> Tensor:
    """Who is among the k nearest of whom, [N, N]."""
    x_ND = F.normalize(x_ND.double(), dim=-1)
    cosine_NN = (x_ND @ x_ND.T).fill_diagonal_(-math.inf)
    return torch.zeros_like(cosine_NN, dtype=torch.bool).scatter_(1, cosine_NN.topk(k).indices, True)


def _biased_hsic(K_NN: Tensor, L_NN: Tensor) -> float:
    """Up to a factor, of centred kernels."""
    return (K_NN * L_NN).sum().item()


def _unbiased_hsic(K_NN: Tensor, L_NN: Tensor) -> float:
    """Up to a factor: Song et al. 2012, equation 5."""
    n = len(K_NN)
    K_NN, L_NN = (kernel.clone().fill_diagonal_(0) for kernel in (K_NN, L_NN))
    product = K_NN @ L_NN
    both = K_NN.sum() * L_NN.sum() / ((n - 1) * (n - 2))
    return (product.trace() + both - 2 * product.sum() / (n - 2)).item()


def _check(x_ND: Tensor, y_NE: Tensor, least: int) -> None:
    if len(x_ND) != len(y_NE) or len(x_ND) < least:
        raise DataError(
            f"{len(x_ND)} pictures and {len(y_NE)} texts cannot be compared one to one",
            f"give each picture its words, at least {least} of them",
        )
