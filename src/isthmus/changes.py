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
from isthmus.errors import abbreviated
from isthmus.types import ConfigError

if TYPE_CHECKING:
    from isthmus.model import VLM

ROUNDED = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that a base may have gone through in memory; what is left of its numbers then is no change."""
FEW_BITS, STEP = 2**-6, 2**-23
"""Roundings change less of a number, as a share and at all: bfloat16 has 8 bits, and float16 no step below 2^-24."""


def outline(model: VLM, whole: bool) -> VLM:
    """The structure that loading would give a saved model, on the meta device: names and shapes, no numbers.

    Whole, it follows from the config in the directory; else from those of the base parts. A joint whose parts reckon
    with numbers while they are built cannot be built there, and is on the CPU.
    """
    try:
        return _built(model, whole, "meta")
    except Exception:  # whatever it is: on the CPU it is either gone or told
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
            f"other code has put {abbreviated(added)} into the model, which could not be loaded",
            "merge it first (peft's merge_and_unload), or put it on with `isthmus import ADAPTER OUT --onto MODEL`",
        )
    if lost := [key for key in known if key not in found]:
        raise ConfigError(
            f"the model no longer has {abbreviated(lost)}",
            "set its LLM's config to what the model has (num_hidden_layers …), or load the model again"
            if whole
            else "save with whole=True, or load the model again and leave its parts as they are",
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
    the model's: they are then read where they lie. Where rounding alone may have made a difference, the part is read
    in float32 as well.

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
        dtype = min(kept, key=lambda one: one.itemsize, default=torch.float32)
        base = load(dtype)
        tied = {f"{prefix}.{key}": f"{prefix}.{first}" for key, first in first_names(base).items()}
        tensors = {
            key: state.get(key, live[key]).detach()
            for key in own
            if firsts[key] == key or tied[key] != tied.get(firsts[key])  # else it is looked at under its first name
        }
        known = _prefixed(prefix, base)
        changed = [key for key, tensor in tensors.items() if not _same(tensor, known[key])]
        if dtype != torch.float32 and any(_near(tensors[key], known[key]) for key in changed):
            del base, known
            known = _prefixed(prefix, load(torch.float32))
            changed = [key for key in changed if not _same(tensors[key], known[key])]
        for key in changed:
            for first, where in ((firsts[key], "the model"), (tied[key], "its base")):
                if first != key:
                    raise ConfigError(
                        f"{key} has changed, and is tied to {first} in {where} alone",
                        "load the model again, and tie what its base ties",
                    )
        found += changed
    return found


def first_names(module: nn.Module) -> dict[str, str]:
    """Every key of a module with the first key of the same tensor: tied weights go by that one."""
    seen: dict[int, str] = {}
    return {key: seen.setdefault(id(tensor), key) for key, tensor in module.state_dict(keep_vars=True).items()}


def _loaders(model: VLM, llm: LLMConfig) -> Iterator[tuple[str, Callable[[torch.dtype], nn.Module]]]:
    yield "llm", partial(parts.load_llm, llm)
    for kind in model.encoders:
        yield f"encoders.{kind}", partial(parts.load_encoder, model.config.encoder(kind))


def _prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in module.state_dict().items()}


def _same(found: Tensor, base: Tensor) -> bool:
    """Whether a tensor is the base's, as it is or as a dtype in between has left it."""
    fitted = _fitted(found, base)
    if fitted is None:
        return False
    if torch.equal(found, fitted.to(found.dtype)):
        return True
    return fitted.is_floating_point() and any(torch.equal(found, fitted.to(each).to(found.dtype)) for each in ROUNDED)


def _near(found: Tensor, base: Tensor) -> bool:
    """Whether a tensor may be the base's, rounded more often than the base was when it was read."""
    fitted = _fitted(found, base)
    if fitted is None or not fitted.is_floating_point():
        return False
    return torch.allclose(found.float(), fitted.float(), rtol=FEW_BITS, atol=STEP)


def _fitted(found: Tensor, base: Tensor) -> Tensor | None:
    """The base's tensor where the other one is, in its shape; None if it cannot have it."""
    base = base.to(found.device)
    if base.shape == found.shape:
        return base
    # new tokens lengthen a buffer of the head by zeros; else it was pruned, or grew
    if base.ndim != found.ndim or base.shape[:-1] != found.shape[:-1] or base.shape[-1] > found.shape[-1]:
        return None
    return F.pad(base, (0, found.shape[-1] - base.shape[-1]))
