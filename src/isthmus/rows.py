"""Rows from call to call: what stands in each of their columns, on which route, and the media that stay aside.

transformers hands a cache from one call to the next and nothing else, so what a joint must know of the columns before
rides on the cache itself. Where rows of a cache are chosen or repeated by hand, `forward` is to be passed theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Cache

from isthmus.types import KINDS, DataError, Past, Route

RIDER = "isthmus_rows"
"""The attribute of a cache that holds its rows."""


@dataclass
class Rows:
    """The columns so far, [B, S], and the media aside as a `Past` has them."""

    modality_BS: Tensor
    route_BS: Tensor | None = None
    vision_BKQD: Tensor | None = None
    media_at_BK: Tensor | None = None


def remember(past: Past, modality_BS: Tensor, route_BS: Tensor | None) -> None:
    """Let the rows of a call ride on the cache that it leaves behind."""
    if past.cache is not None:
        setattr(past.cache, RIDER, Rows(modality_BS, route_BS, past.vision_BKQD, past.media_at_BK))


def recall(cache: Cache | None, row_BS: Tensor) -> Rows:
    """What rides on the cache that rows `row_BS` continue, as far as it reaches: it may have been cropped or emptied.
    Of columns that nothing is known of, text.

    Raises:
        DataError: it is of other rows.
    """
    cached = 0 if cache is None else cache.get_seq_length()
    held: Rows | None = getattr(cache, RIDER, None)
    if held is None or not cached:
        return Rows(row_BS.new_zeros(len(row_BS), cached))
    if len(held.modality_BS) != len(row_BS):
        raise DataError(
            f"a cache of {len(held.modality_BS)} rows is continued by {len(row_BS)}",
            "pass the modality of these rows, and vision and media_at where the joint keeps media aside",
        )
    if cached < held.modality_BS.shape[1] and held.media_at_BK is not None:
        held = replace(held, media_at_BK=held.media_at_BK.masked_fill(held.media_at_BK >= cached, -1))
    route_BS = None if held.route_BS is None else fit(held.route_BS, row_BS.shape[1], same=True)
    return replace(held, modality_BS=fit(held.modality_BS, cached), route_BS=route_BS)


def fit(row_BS: Tensor, columns: int, same: bool = False) -> Tensor:
    """A row cut to so many columns, or grown to them: by text (0), or by the `same` as in its last one."""
    last_B1 = row_BS[:, -1:] if same else row_BS.new_zeros(len(row_BS), 1)
    return torch.cat([row_BS[:, :columns], last_B1.expand(-1, max(0, columns - row_BS.shape[1]))], 1)


def routes(route: Tensor | int, ids_BT: Tensor, columns: int) -> Tensor:
    """A route, one per row, one per id or one per column, as one per column of rows of which the ids are the end. What
    follows its last column is of the same route.

    Raises:
        DataError: it is of other rows.
    """
    route, (rows, length) = torch.as_tensor(route, device=ids_BT.device), ids_BT.shape
    if route.shape == ids_BT.shape:
        return nn.functional.pad(route, (columns - length, 0))
    if route.dim() == 2 and len(route) == rows and length < route.shape[1] <= columns:
        return fit(route, columns, same=True)
    if route.numel() not in (1, rows):
        raise DataError(
            f"routes of shape {list(route.shape)} for ids of shape {list(ids_BT.shape)}",
            "pass one number, one per row, or one per id of the prompt",
        )
    return route.reshape(-1, 1).expand(rows, columns)


def check_routes(route: Tensor | int) -> None:
    """
    Raises:
        DataError: one of them is no `Route`.
    """
    wrong = [each for each in torch.as_tensor(route).unique().tolist() if each not in tuple(Route)]
    if wrong:
        raise DataError(f"route {wrong[0]} is no kind of task", KINDS)
