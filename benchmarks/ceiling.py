"""The matrix-product ceiling of a training step: every product in it, each timed alone at its best.

`share` of a step is the sum of those best times over the time of the step; 1 would mean that nothing else took time.
Attention inside a fused kernel counts as its two products forward and four backward.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

REPEATS = 5
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: False,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: True,
}


@dataclass(frozen=True)
class Operand:
    """What a product's time depends on."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def like(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).fill_(0.01)


Product: TypeAlias = tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]
"""An operator, its arguments (tensors as `Operand`) and its keyword arguments."""


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs inside it, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PRODUCTS:
            options = tuple(sorted((kwargs or {}).items()))
            self.counts[function, tuple(map(_described, args)), options] += 1
        elif function in FUSED:
            query, key = args[1:3] if FUSED[function] else args[:2]
            self.counts.update(_inside(query, key, FUSED[function]))
        return function(*args, **(kwargs or {}))


def best_seconds(work: Callable[[], object]) -> float:
    """Sum over all matrix products in `work()` of the best time of each alone."""
    with Products() as seen:
        work()
    return sum(times * _best(*product) for product, times in seen.counts.items())


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Operand.of(argument)
    return tuple(argument) if isinstance(argument, list) else argument


@torch.no_grad()
def _best(function: Any, arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> float:
    real = [argument.like() if isinstance(argument, Operand) else argument for argument in arguments]
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        function(*real, **dict(options))
        times.append(time.perf_counter() - began)
    return min(times)


def _inside(query: Tensor, key: Tensor, backward: bool) -> Iterator[Product]:
    """The products that a fused attention kernel does, as batched products over all heads."""
    batch, length, keys, width = query.shape[0] * query.shape[1], query.shape[2], key.shape[2], query.shape[3]

    def product(rows: int, inner: int, columns: int) -> Product:
        left = Operand((batch, rows, inner), (rows * inner, inner, 1), query.dtype)
        right = Operand((batch, inner, columns), (inner * columns, columns, 1), query.dtype)
        return aten.bmm.default, (left, right), ()

    yield product(length, width, keys)  # scores, or the gradient of the weights
    yield product(length, keys, width)  # mixed values, or the gradient of the queries
    if backward:
        yield product(keys, length, width)  # the gradient of the keys
        yield product(keys, length, width)  # the gradient of the values
