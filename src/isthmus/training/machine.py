"""What this machine computes fastest in, asked once and then written down; and what to do where its memory ends."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from isthmus.files import read_note, write_text, writing
from isthmus.types import ConfigError, IsthmusError

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


def bfloat16_gain() -> float:
    """How many times faster a matrix product is in bfloat16 than in float32, here and now."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, times = torch.ones(512, 512, dtype=dtype), []
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    return best[torch.float32] / best[torch.bfloat16]


def ceiling(device: torch.device, dtype: torch.dtype, file: Path) -> float:
    """Operations per second of a large matrix product, read from `file` or measured and written there.

    A run that goes on elsewhere is measured against the machine that it is on then.
    """
    threads = torch.get_num_threads()
    wanted = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "threads": threads}
    known = read_note(file)
    if wanted.items() <= known.items() and "operations_per_second" in known:
        return known["operations_per_second"]
    found = measured_ceiling(device, dtype, threads)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(wanted | {"operations_per_second": found}, indent=1))
    return found


@functools.cache
def measured_ceiling(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The best of as many products of two square matrices as fit into that time; measured once in a process."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    product = nn.Linear(size, size, bias=False, dtype=dtype, device=device).requires_grad_(False)
    times: list[float] = []
    until = time.perf_counter() + 0.5
    while len(times) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        product(a)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


SPENT = ("out of memory", "can't allocate memory")
"""How PyTorch says on accelerators and on CPUs that memory has run out."""


@contextlib.contextmanager
def enough_memory(stage: str) -> Iterator[None]:
    """Turns memory that ran out in a stage into a cause and a remedy.

    Raises:
        IsthmusError: instead of the allocator's own error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and not any(words in said for words in SPENT):
            raise
        raise IsthmusError(
            f"stage {stage}: memory ran out ({said[:200]})",
            f"raise stages.{stage}.accumulate to a larger divisor of batch_size, or set stages.{stage}.recompute=true; "
            "the same command goes on from the last checkpoint with either",
        ) from error
