"""Linears in float32 through oneDNN, on processors where PyTorch's own matrix product is half as fast.

PyTorch computes float32 products on CPUs with MKL, which has no AVX-512 code for processors other than Intel's. oneDNN,
which PyTorch brings along too, has: on an AMD EPYC with AVX-512 it does 205 GFLOP/s on one core where MKL does 97
(`benchmarks/roofline.py`). Both accumulate in float32 and differ by rounding alone. No model uses it unless asked
(`use_onednn`): whether its bits are the same run after run with several threads is not shown yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def use_onednn(root: nn.Module) -> int:
    """Give every plain `nn.Linear` inside `root` the class below, before anything is grafted on; says how many.

    Names, parameters and `isinstance` stay as they are, and what is not float32 on a CPU is computed as before.
    """
    chosen = [module for module in root.modules() if type(module) is nn.Linear]
    for module in chosen:
        module.__class__ = Linear
    return len(chosen)


class Linear(nn.Linear):
    """`nn.Linear` whose float32 products on a CPU, forward and backward, are oneDNN's."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        ours = plain and x.numel() and not torch.is_autocast_enabled("cpu")
        if ours and not torch.compiler.is_compiling():  # inductor cannot lower the operator with sizes that vary
            return _Product.apply(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


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
