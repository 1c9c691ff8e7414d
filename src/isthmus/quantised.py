"""Frozen Linears in 4 or 8 bits, unpacked where they are used: NF4 of QLoRA (Dettmers et al., arXiv 2305.14314,
github.com/artidoro/qlora) through bitsandbytes' kernels, and rows of int8 as in LLM.int8() (Dettmers et al.,
arXiv 2208.07339, github.com/bitsandbytes-foundation/bitsandbytes).

Differs:
    - inputs are never rounded, with 8 bits either: training, answering and the unpacked model compute the same;
    - block scales of NF4 stay float32, 4.5 bits per weight in all (QLoRA rounds them once more, to 4.13);
    - a Linear counts as one module with a readable `weight`: what was written for dense hosts works on packed ones.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus import kernels_linear, sites
from isthmus.graft import at, graft, ungraft
from isthmus.types import ConfigError

Bits = Literal[4, 8]
BLOCK = 64
"""Weights that share a scale in 4 bits."""


class Packed(nn.Linear):
    """A Linear that holds codes and scales instead of a weight; `weight` unpacks them, and cannot be written."""

    packed: nn.Parameter
    scale: Tensor

    def __init__(self, dense: nn.Linear, bits: Bits, dtype: torch.dtype):
        nn.Module.__init__(self)  # a Linear's own would make a dense weight first
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.bits, self.dtype = bits, dtype
        codes, scale = pack(dense.weight.detach(), bits)
        self.packed = nn.Parameter(codes, requires_grad=False)  # shards, unlike a buffer
        self.register_buffer("scale", scale)  # float32 under mixed precision, unlike a parameter
        self.bias = dense.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The unpacked weight, [out, in], made anew at every reading."""
        return unpack(self.packed, self.scale, (self.out_features, self.in_features), self.bits, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype that a dense Linear would answer in."""
        dtype = _answering(x)
        shape = self.out_features, self.in_features
        y = cast(Tensor, _Product.apply(x.to(dtype), self.packed, self.scale, shape, self.bits))
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """x Wᵀ, with W unpacked for the product and once more for its gradient: no dense copy waits in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, shape: tuple[int, int], bits: Bits) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.how = shape, bits
        return F.linear(x, unpack(packed, scale, shape, bits, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        packed, scale = ctx.saved_tensors
        shape, bits = ctx.how
        return gradient @ unpack(packed, scale, shape, bits, gradient.dtype), None, None, None, None


def _answering(x: Tensor) -> torch.dtype:
    """The dtype in which a dense Linear would answer; autocast knows nothing of tensors without numbers."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if not x.is_meta and torch.is_autocast_enabled(kind) else x.dtype


# ---------------------------------------------------------------------------------------------- codes


def pack(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales of a weight [out, in].

    Raises:
        ConfigError: 4 bits without bitsandbytes.
    """
    if bits == 8:
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return (weight / scale).round().to(torch.int8), scale
    # one block per row: bitsandbytes' CPU kernel takes wrong scales where a block goes over the end of a row
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
    codes, state = _kernels().quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4")
    return codes, state.absmax


def unpack(codes: Tensor, scale: Tensor, shape: tuple[int, int], bits: Bits, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that codes and scales stand for."""
    if bits == 8:
        return (codes * scale).to(dtype)
    kernels, blocks = _kernels(), torch.Size((len(scale), BLOCK))
    state = kernels.QuantState(scale, shape=blocks, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return kernels.dequantize_4bit(codes, state).flatten()[: shape[0] * shape[1]].reshape(shape)


@functools.cache
def _kernels() -> Any:
    """bitsandbytes' functions; its modules are left alone, for they compute differently in training and in eval."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # asks for a package that nobody needs
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ConfigError(
            "4-bit parts need bitsandbytes", "pip install 'isthmus[quantised]', or use bits=8, which needs nothing"
        ) from None
    return functional


# ---------------------------------------------------------------------------------------------- models


def quantise(root: nn.Module, bits: Bits, dtype: torch.dtype) -> None:
    """Pack every Linear of a pretrained part in place, and give its other parameters `dtype`.

    Heads stay dense: they are often tied to the embedding, and their error falls on the logits themselves. So do the
    Linears inside `nn.MultiheadAttention`, which are read and never called.

    Raises:
        ConfigError: there is no Linear to pack, or 4 bits without bitsandbytes.
    """
    heads = sites.heads(root)
    plain = (nn.Linear, kernels_linear.Linear)
    chosen = [path for path, each in sites.linears(root).items() if type(each) in plain and each not in heads]
    if not chosen:
        raise ConfigError(f"{type(root).__name__} has no Linear to hold in {bits} bits", "leave bits out")
    for path in chosen:
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, Packed(cast(nn.Linear, root.get_submodule(path)), bits, dtype))
    for parameter in root.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def hosts(root: nn.Module) -> dict[str, Packed]:
    """The packed Linears inside `root`, by dotted name."""
    return {path: each for path, each in sites.linears(root).items() if isinstance(each, Packed)}


def dequantise(root: nn.Module) -> list[str]:
    """Put dense Linears of the same values in place of packed ones, with what was grafted on them; their names."""
    found = hosts(root)
    for path, host in found.items():
        additions = {name: ungraft(root, path, name) for name in at(host)}
        dense = nn.Linear(host.in_features, host.out_features, bias=False, device="meta")
        dense.weight, dense.bias = nn.Parameter(host.weight, requires_grad=False), host.bias
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, dense.train(host.training))
        for name, addition in additions.items():
            graft(root, path, name, addition)
    return list(found)


def weights(root: nn.Module) -> dict[str, int]:
    """How many weights each packed parameter stands for, by the parameter's dotted name."""
    return {f"{path}.packed": host.in_features * host.out_features for path, host in hosts(root).items()}
