"""One layer's attention: transformers' sdpa against the `isthmus` kernel, forward and forward with backward.

    python benchmarks/attention.py [--steps N] [--repeats N] [--json FILE]

SmolLM2-135M's heads (9 for queries, 3 for keys, 64 wide) at the shapes of training and scoring. Both are measured
causal without a mask, as in training, and under the dense mask that says the same, as rows padded on the left have it.
Both must agree with float64 first: to 1e-5 (float32) and 2e-2 (bfloat16) of the norm, outputs and gradients.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import harness
from isthmus import kernels

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
SHAPES = ((32, 36), (32, 64), (8, 113), (8, 308), (4, 1073))
TINY_SHAPES = ((2, 8),)
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest error relative to the norm of the float64 result."""
KINDS = ("causal", "masked")
KERNELS = tuple(f"{whose} {kind}" for kind in KINDS for whose in ("sdpa", "isthmus"))


class Layer(nn.Module):
    """What sdpa asks of the attention module that calls it."""

    num_key_value_groups = HEADS // KEY_HEADS
    is_causal = True


@dataclass
class Case:
    """Inputs of one shape and dtype, with the gradient that comes from above."""

    query: Tensor
    key: Tensor
    value: Tensor
    above: Tensor
    additive: Tensor
    allowed: Tensor

    @classmethod
    def draw(cls, rows: int, length: int, dtype: torch.dtype) -> Case:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        query, above = normal(rows, HEADS, length, WIDTH), normal(rows, length, HEADS, WIDTH)
        key, value = normal(rows, KEY_HEADS, length, WIDTH), normal(rows, KEY_HEADS, length, WIDTH)
        for leaf in (query, key, value):
            leaf.requires_grad_()
        allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)
        additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
        return cls(query, key, value, above, additive, allowed)

    def forward(self, kernel: str) -> Tensor:
        """[B, T, heads, d] by one of `KERNELS`."""
        states, scaling = (self.query, self.key, self.value), WIDTH**-0.5
        masked = kernel.endswith("masked")
        if kernel.startswith("isthmus"):
            return kernels.attention(Layer(), *states, self.additive if masked else None, scaling=scaling)[0]
        return sdpa_attention_forward(Layer(), *states, self.allowed if masked else None, scaling=scaling)[0]

    @torch.no_grad()
    def forward_alone(self, kernel: str) -> Tensor:
        return self.forward(kernel)

    def both(self, kernel: str) -> tuple[Tensor, ...]:
        """The output and the gradients of query, key and value."""
        out = self.forward(kernel)
        return out, *torch.autograd.grad(out, (self.query, self.key, self.value), self.above)

    def exact(self) -> tuple[Tensor, ...]:
        """The same in float64, written out."""
        query, key, value = (x.detach().double().requires_grad_() for x in (self.query, self.key, self.value))
        keys, values = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
        scores = (query @ keys.transpose(2, 3) * WIDTH**-0.5).masked_fill(~self.allowed, -torch.inf)
        out = (scores.softmax(-1) @ values).transpose(1, 2)
        return out, *torch.autograd.grad(out, (query, key, value), self.above.double())


def error(case: Case, kernel: str) -> float:
    """The largest error of output and gradients, each relative to its norm."""
    pairs = zip(case.both(kernel), case.exact())
    return max(float((found.detach() - exact.detach()).norm() / exact.detach().norm()) for found, exact in pairs)


def milliseconds(work: Callable[[], object], steps: int) -> float:
    """The mean over `steps` calls, after one that is not counted."""
    work()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    return (time.perf_counter() - began) / steps * 1e3


def measure(rows: int, length: int, dtype: torch.dtype, steps: int, repeats: int) -> dict[str, object]:
    """Errors, and where they are small enough the times; kernels take turns within a repeat."""
    case = Case.draw(rows, length, dtype)
    found: dict[str, object] = {"rows": rows, "length": length, "dtype": str(dtype).removeprefix("torch.")}
    found["errors"] = errors = {kernel: error(case, kernel) for kernel in KERNELS}
    if max(errors.values()) > TOLERANCE[dtype]:
        return found | {"refused": f"error {max(errors.values()):.1e}, more than {TOLERANCE[dtype]:.0e}"}

    for name, work in (("forward", case.forward_alone), ("both", case.both)):
        turns = [{kernel: milliseconds(partial(work, kernel), steps) for kernel in KERNELS} for _ in range(repeats)]
        found[name] = {kernel: harness.Spread.of([turn[kernel] for turn in turns]) for kernel in KERNELS}
        found[f"{name}_gain"] = {
            kind: harness.Spread.of([turn[f"sdpa {kind}"] / turn[f"isthmus {kind}"] for turn in turns])
            for kind in KINDS
        }
    return found


def lines(found: dict) -> list[list[str]]:
    """Table rows of one shape and dtype."""
    what = [f"{found['rows']} x {found['length']}", found["dtype"]]
    if "refused" in found:
        return [[*what, "refused", found["refused"], *[""] * (len(KERNELS) + len(KINDS) - 1)]]
    return [
        [*what, label, *(str(found[name][of]) for of in KERNELS), *(str(found[f"{name}_gain"][of]) for of in KINDS)]
        for name, label in (("forward", "forward"), ("both", "with backward"))
    ]


def main(arguments: list[str] | None = None) -> int:
    options = harness.parser(__doc__, 20, "calls per measurement").parse_args(arguments)
    where = harness.machine()
    shapes, steps = (TINY_SHAPES, 2) if options.tiny else (SHAPES, options.steps)
    cases = [measure(rows, length, dtype, steps, options.repeats) for rows, length in shapes for dtype in DTYPES]
    header = ["rows x tokens", "dtype", "milliseconds", *KERNELS, *(f"sdpa / isthmus, {kind}" for kind in KINDS)]
    print(harness.in_words(where))
    print(f"median (smallest–largest) of {options.repeats} repeats of {steps} calls")
    print(harness.table(header, [line for found in cases for line in lines(found)]))
    print(harness.save("attention", {"machine": where, "cases": cases}, options))
    return int(any("refused" in found for found in cases))


if __name__ == "__main__":
    sys.exit(main())
