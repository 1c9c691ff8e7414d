"""Batches side by side in threads, each with its share of the cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 8
"""Threads that have a batch in hand, where nothing asks for fewer."""


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], most: int | None = None) -> Generator[Result]:
    """`work(item)` of every item, in order, at `most` so many at a time (8), in threads that share out the cores.

    Threads within one operator wait for the slowest at its end, which on cores with other work to do is most of the
    time; and what one core does alone, such as reading pictures, keeps the others waiting. A thread has no autocast and
    no inference mode unless `work` says so. No more than one item per thread is worked ahead of the one that is taken.
    Close it where not all are taken.
    """
    cores = torch.get_num_threads()
    workers = max(1, min(cores, WORKERS if most is None else most, len(items)))
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,)) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            torch.set_num_threads(cores)  # a thread's number is that of all threads begun after it
