"""The key-value cache of all running answers: rows that end at the same column and come and go one by one.

Row b holds its tokens in the columns [start_b, end) and nothing before them: segment 0, which every mask leaves out.
A row joins by being written into a free slot, leaves by having the last row moved into its place, and a decode step
writes one column for all. Sliding layers keep their whole past here, since their mask hides what is too far back; a row
can then be cut to any prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from isthmus import sites
from isthmus.model import VLM
from isthmus.types import ConfigError, Past, Route

ROOM = 256
"""Columns that are added when the cache is full."""
ATTENDING = {"full_attention", "sliding_attention"}


@dataclass(repr=False, eq=False)
class Row:
    """One sequence's past: keys and values per layer, [1, heads, L, d], and what the joint needs to go on."""

    layers: list[tuple[Tensor, Tensor]]
    modality_L: Tensor
    vision_KQD: Tensor | None = None
    media_at_K: Tensor | None = None
    route: int = Route.IMAGE

    def __len__(self) -> int:
        return len(self.modality_L)

    @property
    def bytes(self) -> int:
        held = [x for pair in self.layers for x in pair] + ([] if self.vision_KQD is None else [self.vision_KQD])
        return sum(x.numel() * x.element_size() for x in held)

    def first(self, length: int) -> Row:
        """The same sequence when it had this many tokens, without copying; media that came later are gone."""
        vision, at = self.vision_KQD, self.media_at_K
        if vision is not None and at is not None:
            vision, at = vision[at < length], at[at < length]
        layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]
        return Row(layers, self.modality_L[:length], vision, at, self.route)

    def past(self) -> Past:
        """A past to go on from, whose growth leaves this row as it is."""
        cache = Cache(layers=[_Begun(k, v) for k, v in self.layers])
        vision = None if self.vision_KQD is None or not len(self.vision_KQD) else self.vision_KQD[None]
        at = None if self.media_at_K is None or vision is None else self.media_at_K[None]
        return Past(cache, vision, at)

    @classmethod
    def of(cls, past: Past, modality_L: Tensor, route: int = Route.IMAGE) -> Row:
        """The only row of a past."""
        vision, at = past.vision_BKQD, past.media_at_BK
        layers = [(layer.keys, layer.values) for layer in past.cache.layers]
        return cls(layers, modality_L, None if vision is None else vision[0], None if at is None else at[0], route)


class _Begun(DynamicLayer):
    """A layer that begins with known keys and values."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values


class _Slots(DynamicLayer):
    """One layer's buffers for all slots, [slots, heads, columns, d]; the first `active` rows are seen."""

    def __init__(self, like: tuple[Tensor, Tensor], slots: int):
        super().__init__()
        self.lazy_initialization(*like)
        self.buffers = tuple(x.new_zeros(slots, x.shape[1], 0, x.shape[3]) for x in like)
        self.active = self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *unused: Any, **more: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        keys, values = (buffer[: self.active, :, :end] for buffer in self.buffers)
        keys[:, :, self.length :], values[:, :, self.length :] = key_states, value_states
        self.length = end
        return keys, values

    def reserve(self, columns: int) -> None:
        grow = columns - self.buffers[0].shape[2]
        if grow > 0:
            self.buffers = tuple(torch.nn.functional.pad(buffer, (0, 0, 0, grow)) for buffer in self.buffers)

    def write(self, slot: int, start: int, pair: tuple[Tensor, Tensor]) -> None:
        """Put a row's past at `start`; zeros before it, since a stale NaN times a weight of zero is a NaN."""
        for buffer, x in zip(self.buffers, pair):
            buffer[slot, :, :start] = 0
            buffer[slot, :, start : start + x.shape[2]] = x[0]

    def read(self, slot: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[slot : slot + 1, :, start:end].clone() for buffer in self.buffers)
        return keys, values

    def shift(self, rows: int, by: int, end: int) -> None:
        """Move what the first rows hold up to `end` to the right, or to the left where `by` is negative."""
        for buffer in self.buffers:
            moved = buffer[:rows, :, max(0, -by) : end].clone()
            buffer[:rows, :, : max(0, by)] = 0
            buffer[:rows, :, max(0, by) : end + by] = moved


@dataclass
class _Slot:
    """Where a running row begins, its media and its kind."""

    start: int
    vision_KQD: Tensor | None
    media_at_K: Tensor | None
    route: int


@dataclass(repr=False, eq=False)
class Pool:
    """Running rows; the i-th slot belongs to the i-th row in order.

    Raises:
        ConfigError: the LLM keeps something else than keys and values, which padding would change.
    """

    model: VLM
    slots: int
    end: int = 0
    rows: list[_Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        kinds = set(getattr(self.model.config.text_config, "layer_types", None) or ())
        if self.model.config.is_encoder_decoder or not kinds <= ATTENDING:
            raise ConfigError(
                f"{self.model.config.text_config.model_type} cannot be decoded in rows that come and go",
                "serve a decoder-only LLM whose layers attend; `isthmus chat` takes this one",
            )
        self.head = sites.head(self.model.llm)
        self.layers: list[_Slots] = []
        self.segment_BS = torch.zeros(self.slots, 0, dtype=torch.long, device=self.model.device)
        self.modality_BS = self.segment_BS.clone()
        self._past: Past | None = None

    def __len__(self) -> int:
        return len(self.rows)

    # ------------------------------------------------------------------------------------ coming and going

    def join(self, row: Row) -> None:
        """Take a row into the next slot."""
        if not self.layers:
            self.layers = [_Slots(pair, self.slots) for pair in row.layers]
        if len(row) > self.end:
            self._shift(len(row) - self.end)
        self._reserve(self.end + 1)
        slot, start = len(self.rows), self.end - len(row)
        for layer, pair in zip(self.layers, row.layers):
            layer.write(slot, start, pair)
        self.segment_BS[slot] = 0
        self.segment_BS[slot, start : self.end] = 1
        self.modality_BS[slot] = 0
        self.modality_BS[slot, start : self.end] = row.modality_L
        self.rows.append(_Slot(start, row.vision_KQD, row.media_at_K, row.route))
        self._past = None

    def leave(self, slot: int) -> None:
        """Let a row go; the last one takes its slot."""
        last = len(self.rows) - 1
        if slot != last:
            start = self.rows[last].start
            for layer in self.layers:
                layer.write(slot, start, layer.read(last, start, self.end))
            self.segment_BS[slot], self.modality_BS[slot] = self.segment_BS[last], self.modality_BS[last]
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        self._past = None
        if not self.rows:
            self.end = 0
        elif (gap := min(row.start for row in self.rows)) > self.end // 2:
            self._shift(-gap)

    def read(self, slot: int) -> Row:
        """A copy of a running row's past."""
        row = self.rows[slot]
        layers = [layer.read(slot, row.start, self.end) for layer in self.layers]
        modality_L = self.modality_BS[slot, row.start : self.end].clone()
        return Row(layers, modality_L, row.vision_KQD, row.media_at_K, row.route)

    def clear(self) -> None:
        """Forget every row, whatever state an interrupted step left."""
        self.rows, self.layers, self.end, self._past = [], [], 0, None

    # ------------------------------------------------------------------------------------ one step

    def step(self, ids: Sequence[int]) -> Tensor:
        """Feed each row its next token: logits [B, V] of the one after it."""
        rows = len(self.rows)
        self._reserve(self.end + 1)
        self.segment_BS[:rows, self.end], self.modality_BS[:rows, self.end] = 1, 0
        for layer in self.layers:
            layer.active, layer.length = rows, self.end
        ids_B1 = torch.tensor(ids, device=self.model.device)[:, None]
        if self._past is None:
            self._past = self._gathered()
        embeds_B1D = sites.embedding(self.model.llm)(ids_B1)
        seen = self.end + 1
        hidden_B1D, _, _ = self.model.think(
            embeds_B1D, self.segment_BS[:rows, :seen], self.modality_BS[:rows, :seen], self._routes(seen), self._past
        )
        self.end = seen
        return self.head(hidden_B1D[:, -1])

    def _routes(self, columns: int) -> Tensor | None:
        """The kind of every position, [B, S], where some row is not of the usual one."""
        routes = [row.route for row in self.rows]
        return torch.tensor(routes, device=self.model.device)[:, None].expand(-1, columns) if any(routes) else None

    def _gathered(self) -> Past:
        """The cache, and the rows' media with their columns; rows with fewer have zeros that nothing looks at."""
        cache = Cache(layers=list(self.layers))
        held = [row.vision_KQD for row in self.rows if row.vision_KQD is not None and len(row.vision_KQD)]
        if not held:
            return Past(cache)
        most = max(map(len, held))
        vision_BKQD = held[0].new_zeros(len(self.rows), most, *held[0].shape[1:])
        media_at_BK = torch.full((len(self.rows), most), -1, device=self.model.device)
        for slot, row in enumerate(self.rows):
            if row.vision_KQD is not None and row.media_at_K is not None:
                vision_BKQD[slot, : len(row.vision_KQD)] = row.vision_KQD
                media_at_BK[slot, : len(row.media_at_K)] = row.media_at_K + row.start
        return Past(cache, vision_BKQD, media_at_BK)

    def _reserve(self, columns: int) -> None:
        """Have room for so many columns."""
        grow = columns - self.segment_BS.shape[1]
        if grow > 0:
            grow += ROOM
            self.segment_BS = torch.nn.functional.pad(self.segment_BS, (0, grow))
            self.modality_BS = torch.nn.functional.pad(self.modality_BS, (0, grow))
        for layer in self.layers:
            layer.reserve(self.segment_BS.shape[1])

    def _shift(self, by: int) -> None:
        """Move all rows; to the right it makes room before them, to the left it drops columns that none uses."""
        self._reserve(self.end + max(0, by) + 1)
        rows = len(self.rows)
        for layer in self.layers:
            layer.shift(rows, by, self.end)
        for held in (self.segment_BS, self.modality_BS):
            moved = held[:rows, max(0, -by) : self.end].clone()
            held[:rows, : max(0, by)] = 0
            held[:rows, max(0, by) : self.end + by] = moved
        for row in self.rows:
            row.start += by
        self.end += by
        self._past = None
