"""What terms over pictures and their captions share: which texts there are, which of them are equal, and sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isthmus.types import Batch, ConfigError, DataError

if TYPE_CHECKING:
    from isthmus.objectives import VLM

NO_TEXT = "use aligner blip2 with aligner.options.text=true"


def reads_captions(vlm: VLM) -> None:
    """Nothing but a check.

    Raises:
        ConfigError: the joint has no text half.
    """
    # A joint's own `reading` would load its tokenizer, and a plan has no files to load.
    if not all(hasattr(former, "heads") and former.heads is not None for former in vlm.connectors.values()):
        raise ConfigError(f"the joint {vlm.aligner.name} reads no captions", NO_TEXT)


def captions(batch: Batch) -> dict[str, Tensor]:
    """What is said of each medium in the connector's vocabulary, ids [N, T] by kind.

    Raises:
        DataError: the joint reads none.
    """
    if batch.media and not batch.extra_text:
        raise DataError("no captions for the Q-Former's text half", NO_TEXT)
    return {kind: ids_NT for kind, ids_NT in batch.extra_text.items() if kind in batch.media}


def same(ids_NT: Tensor) -> Tensor:
    """Which texts are equal, [N, N]."""
    return (ids_NT[:, None] == ids_NT[None]).all(-1)


def shares(positive_NM: Tensor) -> Tensor:
    """Every row's positives with equal shares that sum to 1, [N, M]."""
    return positive_NM.float() / positive_NM.sum(1, keepdim=True)


def summed(terms: Iterable[Tensor], batch: Batch) -> Tensor:
    """The sum of a term's kinds; a zero for a batch without media."""
    found = list(terms)
    return torch.stack(found).sum() if found else batch.segment_BT.new_zeros((), dtype=torch.float32)
