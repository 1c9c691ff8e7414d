"""What of a model in memory is no longer the base that it came from, and what could not be read back.

A directory that refers to its base parts is true only if everything that differs from them is in it. Other code (peft,
a merge by hand, a loop of one's own) changes weights in ways that leave no trace on the model, so they are compared
with the files themselves. A cheaper mark taken at load would miss some of those ways in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import parts, quantised
from isthmus.config import LLMConfig
from isthmus.types import ConfigError

if TYPE_CHECKING:
    from isthmus.model import VLM

ROUNDED = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that a base may have gone through in memory; what is left of its numbers then is no change."""


def outline(model: VLM, whole: bool) -> VLM:
    """The structure that loading would give a saved model, on the meta device: names and shapes, no numbers.

    Whole, it follows from the config in the directory; else from those of the base parts. A joint whose parts reckon
    with numbers while they are built cannot be built there, and is on the CPU.
    """
    try:
        return _built(model, whole, "meta")
    except (RuntimeError, TypeError):
        return _built(model, whole, "cpu")


def _built(model: VLM, whole: bool, device: str) -> VLM:
    config: Any = copy.deepcopy(model.config)
    llm_config = LLMConfig(**config.llm["config"])
    text = config.text_config
    if not whole:
        text = parts.llm_config(llm_config.but(architecture=None))
    with torch.random.fork_rng(devices=[]), torch.device(device):
        llm = parts.empty_llm(text, llm_config.attention, torch.bfloat16)
        encoders: Any = {
            kind: parts.empty_encoder(config.encoder(kind), entry["architecture"], dtype=torch.bfloat16)
            for kind, entry in config.encoders.items()
        }
        packed = [(llm, llm_config.bits), *((each, config.encoder(kind).bits) for kind, each in encoders.items())]
        for part, bits in packed:
            if bits is not None and not whole:
                quantised.quantise(part, bits, torch.bfloat16)
        return type(model)(config, llm, encoders)


def check(model: VLM, whole: bool) -> None:
    """Refuse a model whose tensors are not those that loading would make places for.

    Raises:
        ConfigError: another library has added, resized, tied or taken away some.
    """
    expected = outline(model, whole)
    found, known = model.state_dict(keep_vars=True), expected.state_dict(keep_vars=True)
    if added := [key for key in found if key not in known]:
        raise ConfigError(
            f"{added[0]} and {len(added) - 1} more were put into the model by other code and could not be loaded",
            "merge it first (peft's merge_and_unload), or put it on with `isthmus import ADAPTER OUT --onto MODEL`",
        )
    if lost := [key for key in known if key not in found]:
        raise ConfigError(
            f"{lost[0]} and {len(lost) - 1} more of the base are no longer in the model",
            "save with whole=True, or load the model again and leave its parts as they are",
        )
    if other := [key for key, tensor in found.items() if tensor.shape != known[key].shape]:
        key = other[0]
        raise ConfigError(
            f"{key} is {tuple(found[key].shape)}, and loading would make it {tuple(known[key].shape)}",
            "load the model again and leave the shapes of its parts as they are",
        )
    here, there = first_names(model), first_names(expected)
    if tied := [key for key in found if whole and (here[key] == key) != (there[key] == key)]:
        raise ConfigError(
            f"{tied[0]} is tied to another tensor in the model or in its config, and not in both",
            "tie it as the config's tie_word_embeddings says, or load the model again",
        )


def differing(model: VLM, llm: LLMConfig, keys: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """Those of the keys, which belong to base parts, whose tensors are not the base's own; every part is read anew.

    Memory is that of the largest part once more where its files hold another dtype, and next to none where they hold
    the model's: they are then read where they lie.

    Raises:
        ConfigError: a tensor that differs is tied to another one here or in the base alone, so that no directory could
            hold it.
    """
    live, firsts = model.state_dict(keep_vars=True), first_names(model)
    left, found = list(keys), []
    for prefix, load in _loaders(model, llm):
        own = [key for key in left if key.startswith(f"{prefix}.")]
        if not own:
            continue
        kept = {each.dtype for each in map(live.__getitem__, own) if each.is_floating_point()}
        base = load(min(kept, key=lambda one: one.itemsize, default=torch.float32))
        known = {f"{prefix}.{key}": tensor for key, tensor in base.state_dict().items()}
        tied = {f"{prefix}.{key}": f"{prefix}.{first}" for key, first in first_names(base).items()}
        for key in own:
            if firsts[key] != key and tied[key] == tied.get(firsts[key]):
                continue  # another name of a tensor that has been looked at
            if _same(state.get(key, live[key]).detach(), known[key]):
                continue
            for first, where in ((firsts[key], "the model"), (tied[key], "its base")):
                if first != key:
                    raise ConfigError(
                        f"{key} has changed, and is tied to {first} in {where} alone",
                        "load the model again, and tie what its base ties",
                    )
            found.append(key)
    return found


def first_names(module: nn.Module) -> dict[str, str]:
    """Every key of a module with the first key of the same tensor: tied weights go by that one."""
    seen: dict[int, str] = {}
    return {key: seen.setdefault(id(tensor), key) for key, tensor in module.state_dict(keep_vars=True).items()}


def _loaders(model: VLM, llm: LLMConfig) -> Iterator[tuple[str, Callable[[torch.dtype], nn.Module]]]:
    yield "llm", partial(parts.load_llm, llm)
    for kind in model.encoders:
        yield f"encoders.{kind}", partial(parts.load_encoder, model.config.encoder(kind))


def _same(found: Tensor, base: Tensor) -> bool:
    """Whether a tensor is the base's, as it is or as a dtype in between has left it."""
    base = base.to(found.device)
    if base.shape != found.shape:  # new tokens lengthen a buffer of the head by zeros; else it was pruned, or grew
        if base.ndim != found.ndim or base.shape[:-1] != found.shape[:-1] or base.shape[-1] > found.shape[-1]:
            return False
        base = F.pad(base, (0, found.shape[-1] - base.shape[-1]))
    if torch.equal(found, base.to(found.dtype)):
        return True
    return base.is_floating_point() and any(torch.equal(found, base.to(each).to(found.dtype)) for each in ROUNDED)
