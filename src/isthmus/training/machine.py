"""What this machine computes fastest in, asked once and then written down."""

from __future__ import annotations

import time

import torch

from isthmus.types import ConfigError

GAIN = 1.3
"""How much faster bfloat16 must be before it is chosen on a CPU."""


def arithmetic(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 on accelerators, and on CPUs where it is clearly faster.

    Raises:
        ConfigError: no such dtype.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or bfloat16_gain() > GAIN else torch.float32
    if name not in known:
        raise ConfigError(f"no arithmetic named {name!r}", f"use auto, {' or '.join(known)}")
    return known[name]


def bfloat16_gain(size: int = 512, repeats: int = 5) -> float:
    """How many times faster a matrix product is in bfloat16 than in float32, here and now."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(size, size, dtype=dtype), []
        for _ in range(repeats):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    return best[torch.float32] / best[torch.bfloat16]
