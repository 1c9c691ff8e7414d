"""Batches made ahead of time by processes of their own, in the order and with the content that they have anyway.

A feed is a pure function of (step, micro-batch), so its batches can be made anywhere and by any number of workers.
torch's DataLoader hands the numbers out and keeps the order; it starts at whatever step is asked for first.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch.utils.data import DataLoader, Dataset

from isthmus.training.loop import Feed
from isthmus.types import Batch, ConfigError, IsthmusError

AHEAD = 2
"""Micro-batches that every worker has ready or under way."""


class Prefetched:
    """A feed whose batches are made by `workers` processes; with 0 they are made when they are asked for.

    Workers are forked, so they share what is in memory and nothing has to be sent to them. They must not use an
    accelerator: features come from a filled cache, or pixels are encoded by the training process.

    Raises:
        ConfigError: this system cannot fork.
    """

    def __init__(self, feed: Feed, workers: int):
        if workers and not hasattr(os, "fork"):
            raise ConfigError("engine.workers needs a system that forks processes", "set engine.workers to 0")
        self.micros, self._feed, self._workers = feed.micros, feed, workers
        self._batches: Iterator[Batch | _Fault] | None = None
        self._next = -1

    def __call__(self, step: int, micro: int) -> Batch:
        """The batch, as the feed itself would give it.

        Raises:
            IsthmusError: what the feed raises for this batch; or a worker was killed.
        """
        if not self._workers:
            return self._feed(step, micro)
        place = step * self.micros + micro
        if self._batches is None or place != self._next:
            self._start(place)
        self._next = place + 1
        with _telling_of_lost_workers():
            found = next(self._batches)  # type: ignore[arg-type]
        if isinstance(found, _Fault):
            self.close()
            raise found.kind(found.cause, found.remedy)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with _telling_of_lost_workers():
            self.close()
            if isinstance(error, RuntimeError):  # the news of a killed worker interrupts the training wherever it is
                raise error

    def close(self) -> None:
        """End the workers; a later call starts new ones."""
        if self._batches is not None:
            # Left to the iterator's end, they would outlive an error whose traceback still holds it.
            self._batches._shutdown_workers()  # type: ignore[attr-defined]
        self._batches = None

    def _start(self, place: int) -> None:
        self.close()
        loader = DataLoader(
            _Places(self._feed),
            batch_size=None,
            sampler=itertools.count(place),  # type: ignore[arg-type]
            num_workers=self._workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            multiprocessing_context="fork",
            generator=torch.Generator(),  # leaves the training's own random state alone
        )
        with _undisturbed():
            self._batches = iter(loader)


@dataclass(frozen=True)
class _Fault:
    """One of our errors on its way from a worker, which would otherwise arrive without its two lines."""

    kind: type[IsthmusError]
    cause: str
    remedy: str


class _Places(Dataset[Batch]):
    """Batches by their number since the start of the stage."""

    def __init__(self, feed: Feed):
        self._feed = feed

    def __getitem__(self, place: int) -> Batch | _Fault:  # type: ignore[override]
        try:
            return self._feed(*divmod(place, self._feed.micros))
        except IsthmusError as error:
            return _Fault(type(error), error.cause, error.remedy)


def _as_it_is(batch: Batch | _Fault) -> Batch | _Fault:
    return batch


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes forked in here never hear of Ctrl-C and SIGTERM, which reach a whole group of processes: when to stop
    is the training process's decision."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _telling_of_lost_workers() -> Iterator[None]:
    """Turns what a worker's death raises here into a cause and a remedy: DataLoader's own error, or that of a tensor's
    memory which was being handed over just then. What a worker raised itself arrives as `Caught …` and is let through.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if str(error).startswith("Caught ") or (
            isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker")
        ):
            raise
        what = str(error).splitlines()[0] if str(error) else "while it handed a batch over"
        raise IsthmusError(
            f"a process that prepares batches is gone ({what})",
            "it was killed, or memory ran out (shared memory too: /dev/shm); lower engine.workers, or set it to 0",
        ) from error
