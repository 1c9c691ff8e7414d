"""What a picture costs an answer, counted on the model itself without memory for weights: operations, and cache kept.

The composed model really runs, on the meta device: floating-point tensors have shapes and no numbers, while ids,
segments and places are real, since joints gather and scatter by them. So what a joint skips is not counted, and what
it computes twice is. Attention counts densely, without regard to causality; 2 operations per multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache

from isthmus import assembly, planning, sites
from isthmus.config import Recipe
from isthmus.model import VLM
from isthmus.types import Batch, Media, Modality

TEXT = 64
"""Text tokens of the prompt that is counted, beside one picture; the markers around the picture are among them."""
BEFORE = 16
"""Those of them that stand before the picture."""
BYTES = 2
"""Per number that is kept: bfloat16. In float32 it is twice as much."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Costs:
    """One prompt of a picture and `text` tokens, up to the first answered token."""

    text: int
    positions: int
    """Places that the picture takes in the LLM's input."""
    encoder: int
    """Operations of the encoder, whose output may be cached."""
    joint: int
    """Of the connector."""
    llm: int
    """Of the LLM with what is added inside it, head included."""
    text_only: int
    """Of the LLM for the same prompt without the picture."""
    cache: int
    """Bytes of keys and values that the picture adds to the LLM's cache."""
    aside: int
    """Bytes of vectors that are kept beside the cache while an answer is written."""

    @property
    def total(self) -> int:
        """Operations of the whole prefill."""
        return self.encoder + self.joint + self.llm

    @property
    def kept(self) -> int:
        """Bytes that a picture occupies while an answer is written."""
        return self.cache + self.aside


class NoNumbers(TorchDispatchMode):
    """Lets real index tensors meet tensors of the meta device: an operation on both happens there.

    A real mask that chooses rows becomes indices first, since how many it chooses is a shape; and indices that are sent
    to the model's device stay real, since libraries ask them whether there is padding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(x.is_meta for x in tensors) and not all(x.is_meta for x in tensors):
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], [index for mask in args[1] for index in _indices(mask)])
            args, kwargs = tree_map_only(Tensor, _hollow, (args, kwargs))
        elif func is torch.ops.aten._to_copy.default and not (args[0].is_meta or args[0].is_floating_point()):
            kwargs = {**kwargs, "device": args[0].device}
        return func(*args, **kwargs)


def costs(recipe: Recipe) -> Costs:
    """What one image costs this recipe's model, with the options of the joint that its stages end with.

    Raises:
        ConfigError: parts do not fit.
    """
    model = planning.outline(planning.countable(recipe))
    for stage in recipe.stages:
        if stage.joint:
            assembly.rebuild(model, stage.joint)
    return measure(model)


@torch.no_grad()
def measure(model: VLM) -> Costs:
    """What one image costs a model whose weights are on the meta device."""
    model.eval().requires_grad_(False)
    batch, plain = prompt(model, "image"), prompt(model, None)
    features, encoder = count(lambda: model.encode("image", batch.media["image"]))
    batch.media["image"] = replace(batch.media["image"], features=features)
    _, joint = count(lambda: model.connect(batch))
    (cache, aside), llm = count(lambda: _prefill(model, batch))
    (text_cache, _), text_only = count(lambda: _prefill(model, plain))
    return Costs(
        text=TEXT,
        positions=batch.input_ids_BT.shape[1] - TEXT,
        encoder=encoder,
        joint=joint,
        llm=llm - joint,
        text_only=text_only,
        cache=cache - text_cache,
        aside=aside,
    )


class _Whole(nullcontext[None]):
    """Stands for torch's tracker of modules, which stops where a module runs without gradients."""

    parents = ("Global",)


class Counter(FlopCounterMode):
    """Counts the operations of products as one sum, not module by module."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _Whole()


def count(run: Callable[[], Result]) -> tuple[Result, int]:
    """What a function returns, and the operations of the products that it computed."""
    with Counter() as counter, NoNumbers():
        result = run()
    return result, counter.get_total_flops()


def prompt(model: VLM, kind: str | None) -> Batch:
    """`TEXT` ids with a blank medium of a kind among them, or without one."""
    shown = [] if kind is None else [model.placeholder(kind)] * _places(model, kind)
    ids_BT = torch.tensor([[0] * BEFORE + shown + [0] * (TEXT - BEFORE)])
    batch = Batch(ids_BT, torch.ones_like(ids_BT), torch.full_like(ids_BT, int(Modality.TEXT)))
    if model.config.is_encoder_decoder:
        batch = replace(batch, decoder_ids_BU=torch.zeros(1, 1, dtype=torch.long))
    if kind is None:
        return batch
    first = torch.zeros(1, dtype=torch.long)
    media = Media(row_N=first, segment_N=first + 1, at_N=first + BEFORE, pixels=model.encoders[kind].blank())
    batch = replace(batch, modality_BT=model.modality(ids_BT), media={kind: media})
    reading = model.aligner.reading()
    if reading is not None and reading.of == "question":  # an answer is not there yet
        batch.extra_text = {kind: torch.zeros(1, min(TEXT, reading.length), dtype=torch.long)}
    return batch


def _places(model: VLM, kind: str) -> int:
    return model.aligner.layout(kind, model.queries(kind)).count


def _prefill(model: VLM, batch: Batch) -> tuple[int, int]:
    """Run connector and LLM up to the first answered token's logits; bytes of the cache and of what stays aside."""
    if batch.decoder_ids_BU is not None:
        return _read_and_tell(model, batch, batch.decoder_ids_BU)
    output = model.run(batch, keep=True)
    assert output.hidden_BTD is not None and output.past is not None
    output.head(output.hidden_BTD[:, -1:])
    aside = output.past.vision_BKQD
    return _bytes(_held(output.past.cache)), 0 if aside is None else _bytes([aside])


def _read_and_tell(model: VLM, batch: Batch, ids_BU: Tensor) -> tuple[int, int]:
    """An encoder-decoder's cache holds what its decoder reads of the encoder's states."""
    connected = model.connect(batch)
    read_BTD = model.read(batch, model.embed(batch, connected), connected)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    hidden_BUD = model.tell(ids_BU, read_BTD, batch.segment_BT, None, cache)
    sites.head(model.llm)(hidden_BUD)
    return _bytes([*_held(cache.self_attention_cache), *_held(cache.cross_attention_cache)]), 0


def _held(cache: Any) -> list[Tensor]:
    return [numbers for layer in cache.layers for numbers in (layer.keys, layer.values)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return BYTES * sum(tensor.numel() for tensor in tensors)


def _indices(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.is_meta or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero().unbind(1))


def _hollow(x: Tensor) -> Tensor:
    """A tensor's shape on the meta device."""
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
