"""What terms over states at the places of media share: where those places are, and which joints have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.types import IGNORE, Batch, ConfigError, Modality

if TYPE_CHECKING:
    from isthmus.objectives import VLM


@dataclass(frozen=True)
class Places:
    """Places of one kind of medium in a batch, in order: row, column, which medium, and which of its vectors."""

    row_M: Tensor
    column_M: Tensor
    medium_M: Tensor
    vector_M: Tensor

    def __len__(self) -> int:
        return len(self.row_M)

    def __getitem__(self, which: slice | Tensor) -> Places:
        return Places(*(getattr(self, field.name)[which] for field in fields(self)))


def places(batch: Batch, kind: str) -> Places:
    """Told from the first column of each medium, so that pictures side by side stay apart."""
    media, width = batch.media[kind], batch.modality_BT.shape[1]
    row_M, column_M = (batch.modality_BT == Modality[kind.upper()]).nonzero(as_tuple=True)
    start_N, medium_N = (media.row_N * width + media.at_N).sort()
    order_M = torch.searchsorted(start_N, row_M * width + column_M, right=True) - 1
    medium_M = medium_N[order_M]
    return Places(row_M, column_M, medium_M, column_M - media.at_N[medium_M])


def shows(batch: Batch) -> Tensor:
    """Which positions belong to samples that show something, [B, T]."""
    return _within(batch, ((media.row_N, media.segment_N) for media in batch.media.values()))


def tells(batch: Batch) -> Tensor:
    """Which positions belong to samples that carry labels, [B, T]."""
    if batch.labels_BT is None:
        return torch.zeros_like(batch.segment_BT, dtype=torch.bool)
    row_M, column_M = (batch.labels_BT != IGNORE).nonzero(as_tuple=True)
    return _within(batch, [(row_M, batch.segment_BT[row_M, column_M])])


def _within(batch: Batch, segments: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Which positions belong to one of these segments, given by rows and numbers, [B, T]."""
    named_BS = torch.zeros_like(F.pad(batch.segment_BT, (1, 0)), dtype=torch.bool)  # a row has at most T segments
    for row_N, segment_N in segments:
        named_BS[row_N, segment_N] = True
    return named_BS.gather(1, batch.segment_BT)


def has_states(vlm: VLM, who: str, layers: int | None = None, shift: int = 0) -> None:
    """Nothing but a check, in the name of the objective `who`.

    Args:
        layers: of the LLM, after how many the states are read; None is all.
        shift: how many vectors further on in a picture the one stands that a state has to tell.

    Raises:
        ConfigError: media have no places in the LLM, nothing happens to them there, or no state can tell so far.
    """
    told = f"objective {who} with the joint {vlm.aligner.name}: "
    if not vlm.aligner.splices or vlm.config.is_encoder_decoder:
        where = "an encoder-decoder's decoder" if vlm.config.is_encoder_decoder else "the LLM's input"
        raise ConfigError(f"{told}{where} has no places of pictures", "splice into a decoder-only LLM, as llava does")
    depth = vlm.config.text_config.num_hidden_layers
    if layers is not None and layers > depth:
        raise ConfigError(f"{told}layer {layers} of an LLM that has {depth}", "name one of them, or `last`")
    layers = depth if layers is None else layers
    seen, where = vlm.aligner.media_see(layers), "" if layers == depth else f" in the first {layers} of {depth} layers"
    if seen == "nothing":
        raise ConfigError(
            f"{told}places of pictures stay what was put in{where}", "choose a joint whose layers change them"
        )
    if not shift:
        return
    if seen == "themselves":
        raise ConfigError(
            f"{told}places of pictures see themselves alone{where}, so nothing tells them what comes next",
            "set its shift to 0" + (", or read states behind a layer in which they see more" if where else ""),
        )
    counts = {kind: vlm.queries(kind) for kind in vlm.connectors}
    if max(counts.values()) <= shift:
        raise ConfigError(
            f"{told}each {' or '.join(counts)} is a single vector, behind which none comes next",
            "set its shift to 0, or give a picture more vectors",
        )
