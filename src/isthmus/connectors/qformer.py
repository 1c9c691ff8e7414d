"""The querying transformer: learned queries read a picture through BERT-like layers, and may talk with a text.

Li et al. 2023, arXiv 2301.12597 (BLIP-2) and Dai et al. 2023, arXiv 2305.06500 (InstructBLIP, whose queries also read
the instruction). Official code: github.com/salesforce/LAVIS, `blip2_models/Qformer.py`.

Differs:
    - a text half that is only read for its effect on the queries ends one feed-forward earlier: the last layer's
      text states go nowhere, and in the released models 4.7 M parameters wait for a gradient that never comes;
    - text that a caption writes attends to the queries' states of every layer instead of to cached keys and values,
      which is the same product.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.config import Frozen
from isthmus.connectors import Connector
from isthmus.types import ConfigError, Context, Features

EPSILON = 1e-12
"""BERT's, in every LayerNorm."""


class Shape(Frozen):
    """Sizes of a Q-Former; the defaults are BERT-base's, as published."""

    queries: int = Field(32, ge=1)
    """Q: what a picture costs the LLM."""
    layers: int = Field(12, ge=1)
    width: int = Field(768, ge=1)
    heads: int = Field(12, ge=1)
    inner: int = Field(3072, ge=1)
    """Width inside the feed-forward parts."""
    every: int = Field(2, ge=1)
    """Queries look at the picture in the first of so many layers."""
    dropout: float = Field(0.1, ge=0, lt=1)
    vocabulary: int = Field(30523, ge=1)
    """Entries of the text half: BERT's, and one that starts a caption."""
    positions: int = Field(512, ge=1)
    """The longest text."""
    contrast: int = Field(256, ge=1)
    """Width in which the first stage compares pictures and texts."""


class Begun(Shape):
    """Options of a joint with a Q-Former: its sizes, and what it begins as."""

    qformer: str | tuple[str, ...] | None = None
    """Folders or hub names of which weights are taken over before any training: BERT, transformers' BLIP-2 or
    InstructBLIP, a model of Isthmus. Of several, the later stand over the earlier; None is newborn."""


class Attention(nn.Module):
    """BERT's attention with its residual: x + what x finds in `source`, normalised after the sum.

    Args:
        shape: width, heads and dropout.
        source: width of what is looked at; the queries' own by default.
    """

    def __init__(self, shape: Shape, source: int | None = None):
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(source or shape.width, shape.width)
        self.value = nn.Linear(source or shape.width, shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=EPSILON)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_NQW: Tensor, source_NSW: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [N, Q, W] and a source [N, S, W'] -> [N, Q, W]; `mask` [N or 1, Q or 1, S] is True where x may look."""
        query = self._split(self.query(x_NQW))
        key, value = self._split(self.key(source_NSW)), self._split(self.value(source_NSW))
        rate = self.dropout.p if self.training else 0.0
        allowed = None if mask is None else mask.unsqueeze(1)
        seen = F.scaled_dot_product_attention(query, key, value, allowed, dropout_p=rate)
        return self.norm(x_NQW + self.dropout(self.out(seen.transpose(1, 2).flatten(2))))

    def _split(self, x_NSW: Tensor) -> Tensor:
        return x_NSW.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """BERT's two Linears with exact GELU and their residual, normalised after the sum."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.expand = nn.Linear(shape.width, shape.inner)
        self.contract = nn.Linear(shape.inner, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=EPSILON)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_NQW: Tensor) -> Tensor:
        """x [N, Q, W] -> [N, Q, W]."""
        return self.norm(x_NQW + self.dropout(self.contract(F.gelu(self.expand(x_NQW)))))


class Layer(nn.Module):
    """Queries and text share self-attention; only queries look at the picture; each has a feed-forward of its own.

    Args:
        shape: sizes.
        source: E, where this layer's queries look at the picture, else None.
        text: whether text leaves this layer.
    """

    def __init__(self, shape: Shape, source: int | None, text: bool):
        super().__init__()
        self.attention = Attention(shape)
        self.cross = None if source is None else Attention(shape, source)
        self.feed = FeedForward(shape)
        self.text_feed = FeedForward(shape) if text else None

    def forward(self, x_NLW: Tensor, queries: int, picture: Tensor, seen: Tensor | None, mask: Tensor | None) -> Tensor:
        """Queries, then text, [N, Q + T, W] -> the same; without the text where that does not leave this layer.

        Args:
            x_NLW: the states; the first `queries` are the queries'.
            queries: Q.
            picture: [N, S, E].
            seen: [N, 1, S], True at real rows of the picture; None where all are.
            mask: [N, Q + T or 1, Q + T], who may look at whom; None for everyone.
        """
        x_NLW = self.attention(x_NLW, x_NLW, mask)
        q_NQW, t_NTW = x_NLW[:, :queries], x_NLW[:, queries:]
        if self.cross is not None:
            q_NQW = self.cross(q_NQW, picture, seen)
        q_NQW = self.feed(q_NQW)
        if self.text_feed is None or not t_NTW.shape[1]:
            return q_NQW
        return torch.cat([q_NQW, self.text_feed(t_NTW)], 1)

    def read(self, t_NTW: Tensor, before_NQW: Tensor | None, mask: Tensor) -> Tensor:
        """Text alone, or behind the states with which queries entered this layer, [N, T, W] -> [N, T, W]."""
        assert self.text_feed is not None  # QFormer.read refuses
        source = t_NTW if before_NQW is None else torch.cat([before_NQW, t_NTW], 1)
        return self.text_feed(self.attention(t_NTW, source, mask))


class Words(nn.Module):
    """Embeddings of the text half; its positions start at 0 whatever stands before it."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.word = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.positions, shape.width)

    def forward(self, ids_NT: Tensor) -> Tensor:
        """ids [N, T], negative at padding -> [N, T, W]."""
        return self.word(ids_NT.clamp(min=0)) + self.position.weight[: ids_NT.shape[1]]


class Heads(nn.Module):
    """What the first stage compares, matches and writes with.

    The writing head shares the embeddings of the words.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.picture = nn.Linear(shape.width, shape.contrast)
        self.text = nn.Linear(shape.width, shape.contrast)
        self.match = nn.Linear(shape.width, 2)
        self.transform = nn.Linear(shape.width, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=EPSILON)
        self.bias = nn.Parameter(torch.zeros(shape.vocabulary))
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def similarity(self, q_NQW: Tensor, t_MW: Tensor) -> Tensor:
        """Each picture's best query against each text, over the temperature, [N, M]."""
        return self.compare(self.directions(q_NQW), self.direction(t_MW))

    def directions(self, q_NQW: Tensor) -> Tensor:
        """What a picture's queries stand for where pictures and texts are compared, of length 1, [N, Q, C]."""
        return F.normalize(self.picture(q_NQW), dim=-1)

    def direction(self, t_MW: Tensor) -> Tensor:
        """What the first states of texts stand for there, of length 1, [M, C]."""
        return F.normalize(self.text(t_MW), dim=-1)

    def compare(self, picture_NQC: Tensor, text_MC: Tensor) -> Tensor:
        """`similarity` of what is already there, [N, M]."""
        return (picture_NQC @ text_MC.T).amax(1) / self.temperature

    def write(self, t_MW: Tensor, words: Words) -> Tensor:
        """Logits of the next word, [M, vocabulary]."""
        return F.linear(self.norm(F.gelu(self.transform(t_MW))), words.word.weight, self.bias)


class QFormer(Connector):
    """Learned queries -> the LLM's input space.

    Args:
        width: E, the encoder's width.
        out: D, the LLM's width.
        shape: sizes.
        text: `None` for queries alone; `read` for text that only the queries hear of; `whole` where text states are
            used too (BLIP-2's first stage).

    Raises:
        ConfigError: the heads do not divide the width.
    """

    def __init__(self, width: int, out: int, shape: Shape, text: Literal["read", "whole"] | None = None):
        super().__init__()
        if shape.width % shape.heads:
            raise ConfigError(f"{shape.heads} heads do not divide a width of {shape.width}", "change heads or width")
        self.picture_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.empty(shape.queries, shape.width))
        self.words = Words(shape) if text else None
        self.enter = nn.Sequential(nn.LayerNorm(shape.width, eps=EPSILON), nn.Dropout(shape.dropout))
        last = shape.layers - 1
        self.layers = nn.ModuleList(
            Layer(shape, width if n % shape.every == 0 else None, text == "whole" or (text == "read" and n < last))
            for n in range(shape.layers)
        )
        self.heads = Heads(shape) if text == "whole" else None
        self.apply(as_bert)
        for layer in (layer for layer in self.layers if isinstance(layer, Layer)):
            if layer.text_feed is not None:  # both begin alike, as in the paper
                layer.feed.load_state_dict(layer.text_feed.state_dict())
        nn.init.normal_(self.queries, std=0.02)
        self.project = nn.Linear(shape.width, out)

    def tokens(self, s: int) -> int:
        return len(self.queries)

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E] -> y [N, Q, D]."""
        return self.project(self.see(features)[-1])

    def see(self, features: Features, ids_NT: Tensor | None = None, mask: Tensor | None = None) -> list[Tensor]:
        """The states that enter every layer, and those that leave the last: queries, then text, [N, Q + T, W].

        Args:
            features: x [N, S, E].
            ids_NT: text beside the queries, negative at padding.
            mask: [N, Q + T, Q + T], who may look at whom; by default everyone at everything but padding.
        """
        picture, real_NS = self.picture_norm(features.x_NSE), features.real_NS
        seen = None if real_NS is None else real_NS.unsqueeze(1)
        x_NLW = self.queries.expand(picture.shape[0], -1, -1)
        if ids_NT is not None:
            x_NLW = torch.cat([x_NLW, self._words(ids_NT)], 1)
            if mask is None:
                mask = F.pad(ids_NT >= 0, (len(self.queries), 0), value=True).unsqueeze(1)
        states = [self.enter(x_NLW)]
        for layer in self.layers:
            states.append(layer(states[-1], len(self.queries), picture, seen, mask))
        return states

    def read(self, ids_NT: Tensor, behind: list[Tensor] | None = None) -> Tensor:
        """Text without the picture, both ways; or written word by word `behind` the queries that `see` returned.

        ids [N, T], negative at padding -> [N, T, W].

        Raises:
            ConfigError: this Q-Former has no whole text half.
        """
        if self.heads is None:
            raise ConfigError("this Q-Former has no text half", "set aligner.options.text=true")
        real_N1T = (ids_NT >= 0).unsqueeze(1)
        steps = ids_NT.shape[1]
        mask = real_N1T
        if behind is not None:
            causal_TT = torch.ones(steps, steps, dtype=torch.bool, device=ids_NT.device).tril()
            # A padded word at the start of a row still sees the queries, so no row of the mask is empty.
            mask = F.pad(real_N1T & causal_TT, (len(self.queries), 0), value=True)
        t_NTW = self.enter(self._words(ids_NT))
        for depth, layer in enumerate(self.layers):
            t_NTW = layer.read(t_NTW, None if behind is None else behind[depth], mask)  # type: ignore[operator]
        return t_NTW

    def _words(self, ids_NT: Tensor) -> Tensor:
        if self.words is None:
            raise ConfigError("this Q-Former reads no text", "choose a joint whose Q-Former has a text half")
        return self.words(ids_NT)


class InstructedQFormer(QFormer):
    """A Q-Former whose queries hear the instruction before they look (InstructBLIP).

    Args:
        kind: the kind of medium, whose instructions it reads from `Context.extra_text`.
        width, out, shape: as in `QFormer`.
    """

    reads_context: ClassVar[bool] = True

    def __init__(self, kind: str, width: int, out: int, shape: Shape):
        super().__init__(width, out, shape, "read")
        self.kind = kind

    def forward(self, features: Features, context: Context) -> Tensor:
        """x [N, S, E], with the instructions' ids [N, T] in the context -> y [N, Q, D].

        No instruction at all is read as one word of id 0, so that every parameter takes part in every forward.
        """
        ids_NT = context.extra_text.get(self.kind)
        if ids_NT is None:
            ids_NT = torch.zeros(len(features.x_NSE), 1, dtype=torch.long, device=features.x_NSE.device)
        return self.project(self.see(features, ids_NT)[-1])


def as_bert(module: nn.Module) -> None:
    """Normal weights of 0.02 and no bias, as BERT is born."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
