"""Linears in float32 on AMD's processors, where PyTorch's own matrix product is slower than it could be.

PyTorch computes float32 products on CPUs with MKL, which has no AVX-512 code for processors other than Intel's. Where
no gradient is asked for (answers, evaluations, pictures that are encoded) every model's encoder and LLM use instead:

- *Few rows*, as when one answer is decoded: MKL streams weights at 8 GB/s where these cores can at 30. With the
  factors exchanged, (W x')', it does so at 20.
- *More rows*, as when a prompt is read or many answers are decoded: oneDNN, which PyTorch brings along, where the
  processor has AVX-512. A new number of rows costs it a millisecond once.

`benchmarks/decoding.py` times both. Training uses oneDNN when asked (`use_onednn`). All accumulate in float32 and
differ by rounding alone; oneDNN's bits do not depend on the number of threads either, as MKL's do.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import graft

FEW = 4
"""Rows up to which exchanged factors are faster."""
SMALL = 1 << 16
"""Weights below which there is nothing to gain: they stay in the processor's cache."""
PLAIN = (Tensor, nn.Parameter)
"""What weights may be: those of a library that packs them know `F.linear` alone."""


def use_in_inference(*roots: nn.Module) -> int:
    """Give every plain `nn.Linear` inside `roots` the class below, where MKL is slow; says how many.

    Names, parameters and `isinstance` stay as they are, and so does what is grafted on; tools that ask for
    `type(module) is nn.Linear` find none.
    """
    return sum(len(_adopted(root)) for root in roots) if mkl_is_slow() else 0


def use_onednn(root: nn.Module) -> int:
    """The same on any processor, and float32 products with gradients are oneDNN's too, forward and backward."""
    chosen = _adopted(root)
    for module in chosen:
        module.onednn = True
    return len(chosen)


def use_pytorch(root: nn.Module) -> None:
    """Give every Linear inside `root` PyTorch's own products again, as forms of a model are compared in."""
    for module in _made_of(root, Linear):
        graft.rebase(module, nn.Linear)


@functools.cache
def mkl_is_slow() -> bool:
    """Whether float32 products are MKL's on a processor that AMD made."""
    file = Path("/proc/cpuinfo")
    told = file.read_text(errors="replace") if file.is_file() else platform.processor()
    return torch.backends.mkl.is_available() and "AuthenticAMD" in told


@functools.cache
def _avx512() -> bool:
    """Whether oneDNN is there, with the instructions by which it is faster."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


class Linear(nn.Linear):
    """`nn.Linear` with products of its own for float32 on a CPU; whatever else it is given is computed as before."""

    onednn = False

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if not plain or type(self.weight) not in PLAIN or torch.is_autocast_enabled("cpu") or _traced():
            return F.linear(x, self.weight, self.bias)
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        if rows and self.weight.numel() >= SMALL and not torch.is_grad_enabled():
            if rows <= FEW:
                return few_rows(x, self.weight, self.bias)
            if _avx512():
                return _linear(x, self.weight, self.bias)
        if self.onednn and rows:
            return _Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def _traced() -> bool:
    """Whether a graph is made: it is for any number of rows, and inductor cannot lower oneDNN's operator then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, as (W x')'; one row is computed twice, which costs nothing.

    With a single row the product would be MKL's matrix-vector product again.
    """
    x_RI = x.reshape(-1, x.shape[-1])
    rows = len(x_RI)
    y_OR = weight @ (torch.cat([x_RI, x_RI]) if rows == 1 else x_RI).t()
    y_RO = y_OR[:, :rows].t().contiguous()
    return (y_RO if bias is None else y_RO + bias).reshape(*x.shape[:-1], -1)


def _adopted(root: nn.Module) -> list[Linear]:
    """The Linears inside `root` that have the class above, or are given it."""
    for module in _made_of(root, nn.Linear):
        graft.rebase(module, Linear)
    return _made_of(root, Linear)


def _made_of(root: nn.Module, kind: type[nn.Linear]) -> list[Any]:
    """The modules inside `root` that have this very class, grafts aside."""
    return [module for module in root.modules() if graft.base_class(module) is kind]


class _Product(torch.autograd.Function):
    """x W' + b and its gradients, each only where it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else x[:0], weight)
        ctx.biased = bias is not None
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = outer[0].reshape(-1, len(weight))
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _linear(outer[0], weight.t(), None) if to_x else None,
            _linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if to_weight else None,
            rows.sum(0) if ctx.biased and to_bias else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times weight [out, in] transposed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
