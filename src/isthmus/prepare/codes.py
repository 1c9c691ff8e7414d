"""Codebooks from a frozen encoder's features: residual k-means over a sample of pictures, kept beside the features.

Residual quantisation: Lee et al. 2022, arXiv 2203.01941. Lloyd 1982, "Least squares quantization in PCM".

Differs: no network is trained around the codebooks; channels are brought to one scale instead.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus.connectors.codebook import Codebook, Coded, nearest
from isthmus.data.media import content_key
from isthmus.files import replacing
from isthmus.model import VLM
from isthmus.prepare.features import FeatureCache
from isthmus.types import DataError, Medium

PICTURES, VECTORS, ROUNDS = 2000, 1 << 14, 12
"""How many pictures at most, how many of their vectors, and how often Lloyd's two steps are repeated."""
VERSION = 2
"""Of the way in which they are drawn and fitted."""
BATCH = 64
"""Pictures whose features are read at a time."""


def empty(model: VLM) -> list[tuple[Coded, Codebook]]:
    """The connectors that have codebooks and nothing in them yet."""
    coded = [each for each in model.connectors.values() if isinstance(each, Coded)]
    return [(each, each.codebook) for each in coded if each.codebook is not None and not each.codebook.fitted]


def settle(model: VLM, look: FeatureCache, media: Sequence[Medium], seed: int) -> None:
    """Fill the codebooks that are empty, from these pictures or from what an earlier call with the same kept.

    Raises:
        DataError: there are fewer vectors than codes.
    """
    for connector, codebook in empty(model):
        chosen = _spread(media, seed)
        file = _file(look, connector, codebook, chosen, seed)
        if not file.is_file():
            fitted = fit(_vectors(connector, codebook, look, chosen, seed), codebook, seed)
            with replacing(file) as part:
                save_file(fitted, part)
        codebook.load_state_dict(load_file(file))


def fit(x_ME: Tensor, codebook: Codebook, seed: int) -> dict[str, Tensor]:
    """The state of a codebook for these features: every level is k-means of what the levels before it left over.

    Raises:
        DataError: there are fewer vectors than codes.
    """
    levels, size, width = codebook.books_LKE.shape
    if len(x_ME) < size:
        raise DataError(f"{len(x_ME)} vectors of pictures for {size} codes", "lower aligner.options.size")
    random = torch.Generator().manual_seed(seed)
    x_ME = x_ME[torch.randperm(len(x_ME), generator=random)[: _wanted(size)]].float()
    centre_E, spread_E = x_ME.mean(0), x_ME.std(0, correction=0).clamp(min=1e-6)
    rest_ME, books = (x_ME - centre_E) / spread_E, []
    for _ in range(levels):
        book_KE = k_means(rest_ME, size, random)
        rest_ME = rest_ME - book_KE[nearest(rest_ME, book_KE)]
        books.append(book_KE)
    return {"books_LKE": torch.stack(books), "centre_E": centre_E, "spread_E": spread_E}


def k_means(x_ME: Tensor, size: int, random: torch.Generator) -> Tensor:
    """Centres [K, E]: some of the points, moved by Lloyd's steps; one that nothing is near to moves to a far point."""
    book_KE = x_ME[torch.randperm(len(x_ME), generator=random)[:size]].clone()
    for _ in range(ROUNDS):
        near_M = nearest(x_ME, book_KE)
        count_K = near_M.bincount(minlength=size)
        sums_KE = torch.zeros_like(book_KE).index_add_(0, near_M, x_ME)
        used_K = count_K > 0
        gap_M = (x_ME - book_KE[near_M]).square().sum(-1)
        book_KE = sums_KE / count_K.clamp(min=1)[:, None]
        book_KE[~used_K] = x_ME[gap_M.topk(int((~used_K).sum())).indices]
    return book_KE


def _wanted(size: int) -> int:
    """Vectors that codebooks of this size are fitted to."""
    return max(VECTORS, 4 * size)


def _vectors(connector: Coded, codebook: Codebook, look: FeatureCache, media: Sequence[Medium], seed: int) -> Tensor:
    """Vectors [M, E] drawn evenly from these pictures, of which a few at a time are in memory."""
    batches = [media[start : start + BATCH] for start in range(0, len(media), BATCH)]
    random = torch.Generator().manual_seed(seed)
    kept = []
    for batch in batches:
        x_ME = connector.seen(look("image", batch)[1]).flatten(0, 1)
        share = math.ceil(_wanted(codebook.books_LKE.shape[1]) * len(batch) / len(media))
        kept.append(x_ME[torch.randperm(len(x_ME), generator=random)[:share]])
    return torch.cat(kept)


def _spread(media: Sequence[Medium], seed: int) -> list[Medium]:
    """At most `PICTURES` of them, drawn by the seed."""
    order = torch.randperm(len(media), generator=torch.Generator().manual_seed(seed))
    return [media[int(place)] for place in order[:PICTURES]]


def _file(look: FeatureCache, connector: Coded, codebook: Codebook, media: Sequence[Medium], seed: int) -> Path:
    """Where the codebooks for these pictures lie, named by all that they depend on."""
    keys = [content_key(medium.source) for medium in media]
    count = connector.tokens(look.encoder.tokens)
    told = [VERSION, connector.of, count, list(codebook.books_LKE.shape), VECTORS, ROUNDS, seed, keys]
    return look.folder / f"codes-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.safetensors"
