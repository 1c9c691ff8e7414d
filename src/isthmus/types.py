"""The nouns that pass between the rooms of the house: samples, batches, features, outputs.

No module here and no input or output: everything may import this file, and this file imports nothing of ours.

Shape legend, used as suffixes throughout::

    B batch      T sequence (decoder tokens)   N images (or clips) in the batch   K images per sample
    F frames     S encoder tokens              Q connector tokens                 E encoder width
    D LLM width  V vocabulary                  C channels, H height, W width
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from isthmus.errors import ConfigError as ConfigError
from isthmus.errors import DataError as DataError
from isthmus.errors import IsthmusError as IsthmusError
from isthmus.errors import NotFinite as NotFinite
from isthmus.errors import NothingToLearn as NothingToLearn

IGNORE = -100
"""A label that carries no loss."""

Role: TypeAlias = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


class Modality(IntEnum):
    """What stands at a position of the LLM's input (`Batch.modality_BT`)."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


class Route(IntEnum):
    """Which kind of task a segment belongs to (`Batch.route_BT`), for joints that treat kinds apart."""

    IMAGE = 0
    """About the picture as a whole: captions, questions. What nothing else is said of."""
    REGION = 1
    """About places in it: regions in the question or the answer."""


KINDS = "write 0 for a question about the picture as a whole, 1 for one about places in it"
"""The remedy for a number that is no `Route`."""


# ---------------------------------------------------------------------------------------------- what people say


@runtime_checkable
class Drawn(Protocol):
    """A picture that is drawn when it is needed, such as a scene: `key` names its content for caches."""

    @property
    def key(self) -> str: ...

    def draw(self) -> Pillow.Image: ...


LEVELS = "pass levels from 0 to 255 as uint8, [H, W, 3] or [3, H, W]"
Source: TypeAlias = str | Path | bytes | Pillow.Image | Drawn
"""Where pixels come from: a path, encoded bytes, an open picture, or something that draws itself."""


@dataclass(frozen=True)
class Text:
    text: str
    given: bool = False
    """In an answer: not learnt, like the printed words of a form that is filled in."""


@dataclass(frozen=True)
class Image:
    """A picture; levels from 0 to 255 in an array or tensor, [H, W], [H, W, 3] or [3, H, W], are made an open one."""

    source: Source

    def __post_init__(self) -> None:
        given = self.source
        if isinstance(given, np.ndarray | Tensor):
            sound = given.dtype in (np.uint8, torch.uint8) and given.ndim in (2, 3) and 0 not in given.shape
            levels = np.asarray(given.cpu() if isinstance(given, Tensor) else given) if sound else np.empty((0, 0, 0))
            if levels.ndim == 3 and levels.shape[0] == 3 != levels.shape[2]:
                levels = np.moveaxis(levels, 0, 2)
            if levels.shape[2:] not in ((), (3,)):
                raise DataError(f"a picture is an array {list(given.shape)} of {given.dtype}", LEVELS)
            object.__setattr__(self, "source", Pillow.fromarray(levels))


@dataclass(frozen=True)
class Video:
    source: str | Path | bytes
    frames: int | None = None
    """How many frames to sample; None leaves it to the encoder."""
    span: tuple[float, float] | None = None
    """The stretch that is shown, in seconds from the beginning; None is all of it."""


@dataclass(frozen=True)
class Audio:
    source: str | Path | bytes


@dataclass(frozen=True)
class Tag:
    """A word that something else saw in the picture (a tagger), and how sure it was."""

    text: str
    score: float = 1.0


@dataclass(frozen=True)
class Box:
    """A region, normalised xyxy in [0, 1] of the original picture; papers render it as they like.

    It belongs to the picture before it. `label` are the words that it points out, which are written with it.
    """

    xyxy: tuple[float, float, float, float]
    label: str = ""

    def __post_init__(self) -> None:
        x1, y1, x2, y2 = self.xyxy
        if not (0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1):
            raise ValueError(f"box {self.xyxy} is not normalised xyxy; divide by the picture's width and height")


@dataclass(frozen=True)
class Grounding:
    """Asks for an answer with regions; a joint with a token for that writes it here, others write nothing."""


Part: TypeAlias = Text | Image | Video | Audio | Tag | Box | Grounding
PARTS: frozenset[type] = frozenset(get_args(Part))
Medium: TypeAlias = Image | Video | Audio
KIND: dict[type, str] = {Image: "image", Video: "video", Audio: "audio"}
"""The kind of a medium: the key of its encoder, connector and `Batch.media` entry."""


@dataclass(frozen=True)
class Turn:
    """What one role says.

    Raises:
        DataError: the role, or a part, is none of those above.
    """

    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"no role is called {self.role!r}", f"a turn is said by one of {', '.join(ROLES)}")
        for part in self.parts:
            if type(part) not in PARTS:
                remedy = "a picture or its path as Image(...)" if isinstance(part, Source) else "it, as in Text(...)"
                raise DataError(f"{type(part).__name__} is no part of a turn", f"wrap {remedy}")

    @classmethod
    def say(cls, role: Role, *parts: Part | str) -> Turn:
        """`Turn.say("user", Image("cat.png"), "What is this?")`"""
        return cls(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def media(self) -> tuple[Medium, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image | Video | Audio))


@dataclass(frozen=True)
class Sample:
    """One conversation. `pair` is its other ending: the rejected answer, or what is to be retained.

    `branches` are further conversations that begin like this one, with the same media: many questions about one
    picture, or many answers to one question. Their common beginning is read once, and none sees another.
    """

    turns: tuple[Turn, ...]
    id: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    pair: tuple[Turn, ...] | None = None
    branches: tuple[tuple[Turn, ...], ...] = ()

    @property
    def media(self) -> tuple[Medium, ...]:
        return tuple(medium for turn in self.turns for medium in turn.media)

    @property
    def pictures(self) -> tuple[Image, ...]:
        """Its media without sounds and videos."""
        return tuple(medium for medium in self.media if isinstance(medium, Image))

    def but(self, **changes: Any) -> Sample:
        return replace(self, **changes)


# ---------------------------------------------------------------------------------------------- what models read


@dataclass(frozen=True)
class Layout:
    """How one medium appears in the token stream: text, `count` placeholders that are overwritten, text.

    A joint that stays aside has count 0 and marks the place with text alone. The texts may hold special tokens.
    """

    count: int
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Reading:
    """Text that a connector reads beside features, at most `length` tokens per medium.

    A question is the turn that holds the medium, an answer what is said next. `tokenizer` is a vocabulary of
    the connector's own, which a joint names and a processor keeps as JSON; None is the LLM's.
    """

    length: int
    of: Literal["question", "answer"] = "question"
    tokenizer: str | None = None


@dataclass
class Features:
    """What an encoder saw: `x_NSE`, named intermediate states (`taps`, each [N, S', E']) and the grid of S.

    `lengths_N` says how many of the S rows are real where pictures differ in size; None means all of them.
    `grid` is (rows, columns) of S when the rows form one, else None.
    """

    x_NSE: Tensor
    taps: dict[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    lengths_N: Tensor | None = None

    @property
    def real_NS(self) -> Tensor | None:
        """Which of the S rows are no padding; None where all are real."""
        if self.lengths_N is None:
            return None
        return torch.arange(self.x_NSE.shape[1], device=self.x_NSE.device) < self.lengths_N[:, None]

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """The same features with `change` applied to `x_NSE` and every tap (a cast, a move, an index)."""
        taps = {name: change(tap) for name, tap in self.taps.items()}
        return replace(self, x_NSE=change(self.x_NSE), taps=taps)


@dataclass
class Media:
    """All media of one kind in a batch, in order of appearance: pixels, or features that were cached.

    `pixels` is [N, C, H, W] for images, [N, F, C, H, W] for video, [N, channels, time] for audio.
    `row_N` is the batch row and `segment_N` the segment (from 1) to which each medium belongs; `at_N` is the
    column of its first placeholder, or of what follows its place where the joint keeps media aside.
    """

    row_N: Tensor
    segment_N: Tensor
    at_N: Tensor
    pixels: Tensor | None = None
    features: Features | None = None

    def __len__(self) -> int:
        return len(self.row_N)


@dataclass
class Batch:
    """What collate promises to a model. Checked once, in collate, with the sample's id in the error.

    `labels_BT` are unshifted: the state at t predicts `labels_BT[:, t + 1]`. `segment_BT` is 0 at padding and
    counts samples from 1 within a row; positions follow from it. An encoder-decoder reads `input_ids_BT` in its
    encoder and `decoder_ids_BU` in its decoder, and its labels then have the decoder's length.
    """

    input_ids_BT: Tensor
    segment_BT: Tensor
    modality_BT: Tensor
    labels_BT: Tensor | None = None
    decoder_ids_BU: Tensor | None = None
    media: dict[str, Media] = field(default_factory=dict)
    route_BT: Tensor | None = None
    """The task kind of each position's segment, for routers."""
    draw_BT: Tensor | None = None
    """What each position's sample drew from [0, 1), where terms of the loss are about a share of the samples; -1 for
    a sample that carries no label and so belongs to every term that can learn from it."""
    branch_BT: Tensor | None = None
    """0 where a segment's conversations share their beginning, then 1, 2, ... for what follows in each."""
    extra_text: dict[str, Tensor] = field(default_factory=dict)
    """Per kind, what its connector reads (`Reading`): ids with one row per medium, -1 at padding.

    Where answers are read, `text` has those of the samples without a medium, one row each."""
    targets: dict[str, Tensor] = field(default_factory=dict)
    """What others computed beforehand: a teacher's, a generator's, a prompt teacher's."""
    ids: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            if isinstance(value, Features | Media):
                return replace(value, **{f.name: move(getattr(value, f.name)) for f in fields(value)})
            return value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Context:
    """What a connector may read besides features. A connector that reads text or route says `reads_context = True`,
    and its output is then never reused across questions."""

    extra_text: Mapping[str, Tensor] = field(default_factory=dict)
    route_N: Tensor | None = None
    words: Callable[[], Tensor] | None = None
    """Every word as the LLM reads it [V, D], the same for every question; None outside of a model."""


@dataclass(frozen=True)
class Side:
    """What a layer may need besides hidden states. Read-only, passed explicitly as `side=`.

    `modality_BT`, `segment_BT` and `route_BT` cover the positions of this call (one column when decoding).
    `vision_BKQD` are connected media that stay aside; `media_mask_BTK` is True where a position may look at
    medium k.
    """

    modality_BT: Tensor
    segment_BT: Tensor
    route_BT: Tensor | None = None
    vision_BKQD: Tensor | None = None
    media_mask_BTK: Tensor | None = None


@dataclass
class Past:
    """What a call leaves behind for the next one: the key-value cache, and media that stay aside.

    `media_at_BK` is the position of each medium's marker in its row, -1 where a row has fewer than K.
    """

    cache: Any
    vision_BKQD: Tensor | None = None
    media_at_BK: Tensor | None = None

    def repeat(self, times: int) -> Past:
        """Every row `times` times in place, for scoring several continuations of one prefix."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(times)
        again = [None if x is None else x.repeat_interleave(times, 0) for x in (self.vision_BKQD, self.media_at_BK)]
        return Past(cache, *again)


@dataclass
class Output:
    """What a VLM returns to objectives: states, not logits. `head` turns chosen states into logits.

    `hidden_BTD` is None when the LLM was not run (a warm stage reads `connected` alone), and `connected` is empty where
    connectors were not run either.
    `embed` gives the LLM's input embeddings of token ids.
    """

    hidden_BTD: Tensor | None
    connected: dict[str, Tensor]
    """Per kind, `y_NQD`."""
    head: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], Tensor]
    positions_BT: Tensor | None = None
    side: Side | None = None
    past: Past | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    """States after so many layers [B, T, D], before any norm behind them: those that objectives read."""
    encoded: dict[str, Features] = field(default_factory=dict)
    """Per kind, what its connector reads."""
    shared: dict[tuple[str, str], Any] = field(default_factory=dict)
    """What an objective computed that others of this forward need too, by name and kind."""
