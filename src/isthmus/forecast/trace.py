"""One training step without numbers: its operations, and the bytes that are alive, on the meta device.

The step is the one that would run: the recipe's objectives on a batch of its own data, forward and backward, with what
trains awake. Token ids, segments and places are real, as in `costs`; all else has shapes alone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from isthmus import costs
from isthmus.costs import NoNumbers
from isthmus.training.step import Step
from isthmus.types import Batch


@dataclass(frozen=True)
class Operand:
    """What the time of an operation depends on, of one tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class Operation:
    """One kind of call: what is computed, of what."""

    function: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def bytes(self) -> int:
        return sum(leaf.bytes for leaf in tree_leaves(self.arguments) if isinstance(leaf, Operand))


@dataclass(frozen=True)
class Trace:
    """What one step computes and holds."""

    flops: int
    kept: int
    """Bytes that the forward leaves for the backward."""
    peak: int
    """The most bytes alive at once, gradients included and weights not."""
    calls: Counter[Operation] = field(repr=False)


def trace(step: Step, batches: list[Batch]) -> Trace:
    """One optimizer step over micro-batches, up to its gradients.

    Raises:
        Exception: something in it depends on numbers, so that there is no plan of it; of what kind is the operator's.
    """
    ledger = Ledger(step)
    step.ready()
    for parameter in step.parameters():
        parameter.grad = None
    scales = step.scales(batches)
    kept = 0
    with costs.Counter() as counter, ledger, NoNumbers():
        for batch in batches:
            before = ledger.alive
            total, _ = step(batch, scales)
            kept = max(kept, ledger.alive - before)
            if total.requires_grad:
                total.backward()
            del total
    return Trace(counter.get_total_flops(), kept, ledger.peak, ledger.calls)


class Ledger(TorchDispatchMode):
    """Counts calls by kind, and the bytes of storages that live, beyond those of a module's parameters."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.calls: Counter[Operation] = Counter()
        self.alive = self.peak = 0
        own = [*module.parameters(), *module.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        options = tuple((name, _described(value)) for name, value in sorted(kwargs.items()))
        self.calls[Operation(function, tuple(map(_described, args)), options)] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._leave, place, size)

    def _leave(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.alive -= size


@contextmanager
def in_dtype(step: Step, dtype: torch.dtype) -> Iterator[None]:
    """All floating-point weights of a step without numbers, and the tables of its connectors, in one dtype, as autocast
    computes; afterwards as before."""
    tensors = [*step.parameters(), *step.vlm.connectors.buffers()]
    before = [tensor.dtype for tensor in tensors]
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, own in zip(tensors, before):
            tensor.grad = None
            tensor.data = tensor.data.to(own)


def _described(argument: Any) -> Any:
    """An argument as something that can be a key."""
    if isinstance(argument, Tensor):
        return Operand(tuple(argument.shape), tuple(argument.stride()), argument.dtype)
    if isinstance(argument, list | tuple):
        return tuple(map(_described, argument))
    return argument
