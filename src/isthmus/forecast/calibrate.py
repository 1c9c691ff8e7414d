"""How fast this machine is at the very operations of a step: each kind is done alone, for about a second in all.

Operands are made up in the shapes, strides and dtypes of the trace. With one thread the thread's own clock is read,
which a busy machine hardly moves. What does not fit into the time or the memory counts at the mean speed of what did.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from isthmus.forecast.trace import Ledger, Operand, Operation

LARGEST = 1 << 29
"""Bytes of operands that are still tried."""
TRAINED = 1 << 20
"""Parameters that the optimizer's speed is measured on."""


@dataclass(frozen=True)
class Speed:
    """What a step's parts take here, in seconds."""

    operations: float
    """All of its calls, one after the other."""
    host: float
    """Python and autograd around them."""
    tried: float
    """The share of the bytes and products of all calls that was tried."""

    @property
    def total(self) -> float:
        return self.operations + self.host


def speed(calls: Counter[Operation], device: torch.device, seconds: float = 1.0) -> Speed:
    """The time of a step's calls on this machine."""
    ordered = sorted(calls.items(), key=lambda item: -item[0].bytes * item[1])
    until = time.perf_counter() + seconds
    known = tried = rest = 0.0
    for operation, times in ordered:
        late = time.perf_counter() > until
        spent = None if late or operation.bytes > LARGEST else _alone(operation, device)
        if spent is None:
            rest += operation.bytes * times
        else:
            known += spent * times
            tried += operation.bytes * times
    share = tried / max(1.0, tried + rest)
    return Speed(known / max(share, 1e-9), host(device) * calls.total(), share)


def host(device: torch.device, depth: int = 48) -> float:
    """Seconds that Python, modules and autograd add to one call, beyond the call itself: of a chain of tiny modules."""
    chain = nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(8, 8), nn.SiLU()))).to(device)
    x = torch.ones(1, 8, device=device)
    ledger = Ledger(chain)
    with ledger:
        chain(x).sum().backward()
    whole = best(lambda: chain(x).sum().backward(), device, 5)
    alone = sum((_alone(call, device) or 0.0) * times for call, times in ledger.calls.items())
    return max(0.0, whole - alone) / ledger.calls.total()


def optimizer(trained: int, device: torch.device) -> float:
    """Seconds of clipping and AdamW over so many parameters."""
    weight = nn.Parameter(torch.ones(TRAINED, device=device))
    weight.grad = gradient = torch.full_like(weight, 1e-3)
    adamw = torch.optim.AdamW([weight], fused=True)

    def update() -> None:
        torch.linalg.vector_norm(gradient)
        gradient.mul_(0.999)
        adamw.step()

    return best(update, device, 5) * trained / TRAINED


def best(work: Callable[[], object], device: torch.device, times: int) -> float:
    """The shortest of several runs, after one that is not counted."""
    work()
    found = []
    for _ in range(times):
        began = now()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        found.append(now() - began)
    return min(found)


def now() -> float:
    """Seconds on the clock of this thread where there is one thread, else on the wall's."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _alone(operation: Operation, device: torch.device) -> float | None:
    """Seconds of one call; None where made-up operands do not suit it."""

    def make(operand: Operand) -> Tensor:
        made = torch.empty_strided(operand.shape, operand.stride, dtype=operand.dtype, device=device)
        return made.fill_(0.01 if operand.dtype.is_floating_point else 0)

    try:
        with torch.no_grad():
            arguments = tree_map_only(Operand, make, operation.arguments)
            options = {name: _placed(value, device) for name, value in operation.options}
            options = tree_map_only(Operand, make, options)
            spent = best(lambda: operation.function(*arguments, **options), device, 2)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None
    return spent


def _placed(value: Any, device: torch.device) -> Any:
    return device if isinstance(value, torch.device) else value
