"""How fast this machine is at the very operations of a step: each kind is done alone, for about a second in all.

Operands are made up in the shapes, strides and dtypes of the trace. With one thread the thread's own clock is read,
which a busy machine hardly moves. What does not fit into the time or the memory is extrapolated: products by their
operations, all else by its bytes, at the speed of those that were tried and of one measured on purpose.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from isthmus.costs import Counter as Counted
from isthmus.forecast.trace import Ledger, Operand, Operation

LARGEST = 1 << 29
"""Bytes of operands that are still tried."""
TRAINED = 1 << 24
"""Parameters on which, at most, the speed of the optimizer and of casts is measured: more than caches hold."""
SIDE = 1024
"""Rows and columns of what is measured on purpose: a product of two such matrices, and a copy of 16 of them."""
FREE = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
"""Calls that move nothing, besides those that PyTorch itself calls views."""


@dataclass(frozen=True)
class Speed:
    """What a step's parts take here, in seconds."""

    operations: float
    """All of its calls, one after the other."""
    host: float
    """Python and autograd around them."""
    tried: float
    """The share of these operations' seconds that was measured and not extrapolated."""

    @property
    def total(self) -> float:
        return self.operations + self.host


@dataclass
class _Rate:
    """Work that was measured, floating-point operations or bytes, and its seconds."""

    work: float
    seconds: float

    def of(self, work: float) -> float:
        return self.seconds * work / self.work


def speed(calls: Counter[Operation], device: torch.device, seconds: float = 1.0) -> Speed:
    """The time of a step's calls on this machine."""
    moving = {operation: times for operation, times in calls.items() if not _free(operation)}
    work = {operation: _work(operation) for operation in moving}
    rates = {kind: _on_purpose(kind, device) for kind in {kind for kind, _ in work.values()}}
    guess = {operation: rates[kind].of(amount) for operation, (kind, amount) in work.items()}
    known, rest = _handing(device) * (calls.total() - sum(moving.values())), []
    until = time.perf_counter() + seconds
    for operation in sorted(moving, key=lambda each: -guess[each] * moving[each]):
        barred = operation.bytes > LARGEST or guess[operation] > seconds or time.perf_counter() > until
        spent = None if barred else _alone(operation, device)
        if spent is None:
            rest.append(operation)
            continue
        known += spent * moving[operation]
        kind, amount = work[operation]
        rates[kind].work += amount * moving[operation]
        rates[kind].seconds += spent * moving[operation]
    total = known + sum(rates[work[each][0]].of(work[each][1]) * moving[each] for each in rest)
    return Speed(total, host(device) * calls.total(), known / max(total, 1e-12) if rest else 1.0)


def _free(operation: Operation) -> bool:
    """Whether a call moves nothing, however large its operands are."""
    return getattr(operation.function, "is_view", False) or _name(operation) in FREE


def _name(operation: Operation) -> str:
    return str(getattr(operation.function, "overloadpacket", operation.function)).rpartition(".")[2]


def _work(operation: Operation) -> tuple[torch.dtype | None, float]:
    """What a call's time grows with: a product's operations, with its dtype; the bytes of all else, with None."""
    with Counted() as counter:
        _call(operation, torch.device("meta"), lambda run: run())
    if flops := counter.get_total_flops():
        leaves = [leaf.dtype for leaf in tree_leaves(operation.arguments) if isinstance(leaf, Operand)]
        return next((dtype for dtype in leaves if dtype.is_floating_point), torch.float32), flops
    return None, operation.bytes


def _on_purpose(kind: torch.dtype | None, device: torch.device) -> _Rate:
    """The speed of a product in a dtype, or of a copy."""
    if kind is None:
        x = torch.ones(16, SIDE, SIDE, dtype=torch.uint8, device=device)
        return _Rate(x.nbytes, best(x.clone, device, 5))
    x = torch.full((SIDE, SIDE), 0.01, dtype=kind, device=device)
    return _Rate(2.0 * SIDE**3, best(lambda: x @ x, device, 5))


def _handing(device: torch.device) -> float:
    """Seconds of a call that moves nothing."""
    x = torch.ones(8, 8, device=device)
    return best(lambda: x.view(64), device, 5)


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
    tried = max(1, min(trained, TRAINED))
    weight = nn.Parameter(torch.ones(tried, device=device))
    weight.grad = gradient = torch.full_like(weight, 1e-3)
    adamw = torch.optim.AdamW([weight], fused=True)

    def update() -> None:
        torch.linalg.vector_norm(gradient)
        gradient.mul_(0.999)
        adamw.step()

    return best(update, device, 5) * trained / tried


def casts(trained: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of autocast over so many parameters in float32: them before the forward, their gradients behind it."""
    if dtype == torch.float32:
        return 0.0
    tried = max(1, min(trained, TRAINED))
    weight = torch.ones(tried, device=device)
    gradient = torch.ones(tried, dtype=dtype, device=device)
    return best(lambda: (weight.to(dtype), gradient.float()), device, 5) * trained / tried


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
    return _call(operation, device, lambda run: best(run, device, 2))


def _call(operation: Operation, device: torch.device, way: Callable[[Callable[[], object]], Any]) -> Any:
    """What `way` makes of a call with made-up operands; None where they do not suit it."""

    def make(operand: Operand) -> Tensor:
        made = torch.empty_strided(operand.shape, operand.stride, dtype=operand.dtype, device=device)
        return made.fill_(0.01 if operand.dtype.is_floating_point else 0)

    try:
        with torch.no_grad():
            arguments = tree_map_only(Operand, make, operation.arguments)
            options = {name: _placed(value, device) for name, value in operation.options}
            options = tree_map_only(Operand, make, options)
            return way(lambda: operation.function(*arguments, **options))
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None


def _placed(value: Any, device: torch.device) -> Any:
    return device if isinstance(value, torch.device) else value
