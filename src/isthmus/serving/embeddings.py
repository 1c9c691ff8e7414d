"""Vectors of pictures and texts in the space where they meet: the LLM's input.

A picture is the mean of what the joint makes of it, its Q connector tokens; a text is the mean of the LLM's input
embeddings of its tokens, control tokens left out. Both are divided by their length. The LLM itself is not run, so word
order does not count; and where the joint keeps media aside, its vectors live in a space of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus import sites
from isthmus.serving.answers import TooLong
from isthmus.serving.engine import Engine
from isthmus.serving.pictures import Seen
from isthmus.types import Batch, Image


@dataclass
class Embedded:
    """Unit vectors in order, and the tokens that were read for them."""

    vectors: list[Tensor]
    tokens: int


def prepare(engine: Engine, inputs: list[str | Image]) -> list[list[int] | Seen]:
    """Texts as ids and pictures by content, in the caller's thread.

    Raises:
        DataError: a picture cannot be read.
        TooLong: a text has more tokens than the context, all of which would lie in memory as vectors.
    """
    return [_ids(engine, item) if isinstance(item, str) else engine.pictures.see(item) for item in inputs]


def _ids(engine: Engine, text: str) -> list[int]:
    ids = engine.renderer.plain(text)
    if len(ids) > engine.context:
        raise TooLong(f"an input has {len(ids)} tokens; the context holds {engine.context}", "split it")
    return ids


@torch.inference_mode()
def embed(engine: Engine, inputs: list[list[int] | Seen]) -> Embedded:
    """The vectors; to be called in the engine's thread."""
    vectors, tokens = [], 0
    for item in inputs:
        rows_TD = _words(engine, item) if isinstance(item, list) else _picture(engine, item)
        tokens += len(rows_TD)
        vectors.append(F.normalize(rows_TD.float().mean(0), dim=0).cpu())
    return Embedded(vectors, tokens)


def _words(engine: Engine, ids: list[int]) -> Tensor:
    return sites.embedding(engine.model.llm)(torch.tensor(ids, device=engine.model.device))


def _picture(engine: Engine, seen: Seen) -> Tensor:
    features, _ = engine.pictures.look(seen)
    media = engine.pictures.media([features], [0])
    blank_11 = torch.zeros(1, 1, dtype=torch.long, device=engine.model.device)
    batch = Batch(blank_11, torch.ones_like(blank_11), blank_11, media={"image": media})
    return engine.model.connect(batch)["image"][0]
