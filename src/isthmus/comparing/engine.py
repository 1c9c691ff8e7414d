"""How the runs of a comparison are done: in processes of this machine, several at once, or one by one in this process.

`cluster` has an engine for several machines. Every engine calls the same verb on the same recipe file, so that results
do not depend on it. Ctrl-C and SIGTERM let every run save its step. Where this process is killed outright, its children
go on to their end; they hold the comparison's lock until then, and the same command waits for them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
from rich.console import Console

from isthmus.comparing.plan import Job
from isthmus.errors import IsthmusError, NotFinite
from isthmus.experiment import experiment
from isthmus.files import write_text
from isthmus.training import locks
from isthmus.training.signals import interrupts

Outcome: TypeAlias = Literal["done", "diverged"]
Tell: TypeAlias = Callable[[Job, Outcome], None]
GLANCE = 0.1
"""Seconds between two looks at the children."""


class Engine(Protocol):
    """Does all jobs, and tells of each one that ended.

    Raises:
        IsthmusError: a job failed; all but further ones of the same recipe have been done.
        KeyboardInterrupt: it was interrupted; every job has saved.
    """

    def __call__(self, jobs: Sequence[Job], tell: Tell) -> None: ...

    def threads(self) -> int:
        """What each run has."""
        ...


@dataclass
class Processes:
    """Jobs in processes of their own, `at_once` at a time, which share this machine's cores evenly."""

    lock: int
    """The descriptor of the comparison's lock, which children inherit."""
    console: Console
    device: str = "auto"
    at_once: int = 1

    def __call__(self, jobs: Sequence[Job], tell: Tell) -> None:
        waiting, running = list(jobs), dict[int, tuple[Job, subprocess.Popen[bytes]]]()
        failed: list[IsthmusError] = []
        asked = False
        with interrupts(lambda text: self.console.print(text, soft_wrap=True)) as stopped:
            while running or (waiting and not asked):
                while waiting and len(running) < self.at_once and not asked:
                    job = waiting.pop(0)
                    child = self._start(job)
                    running[child.pid] = job, child
                if stopped() and not asked:
                    asked = True
                    for _, child in running.values():
                        child.send_signal(signal.SIGINT)
                for job, error in self._reap(running, tell, asked):
                    failed.append(error)
                    waiting = [other for other in waiting if other.folder.parent != job.folder.parent]
                time.sleep(GLANCE)
        if asked:
            raise KeyboardInterrupt
        if failed:
            raise failed[0]

    def threads(self) -> int:
        return threads_of(self.at_once)

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        file = prepared(job)
        return spawn(file, job.folder, self.device, self.threads(), self.lock)

    def _reap(
        self, running: dict[int, tuple[Job, subprocess.Popen[bytes]]], tell: Tell, asked: bool
    ) -> Iterator[tuple[Job, IsthmusError]]:
        """Take note of the children that ended, and yield those that failed."""
        ended = [number for number, (_, child) in running.items() if child.poll() is not None]
        for job, child in (running.pop(number) for number in ended):
            error = judged(job, child.returncode, tell)
            if error is not None and not asked:
                yield job, error


@dataclass
class Here:
    """Jobs one by one in this process: no second import, and a debugger sees them; their peak memory is ours."""

    console: Console
    device: torch.device

    def __call__(self, jobs: Sequence[Job], tell: Tell) -> None:
        failed: dict[Path, IsthmusError] = {}
        for job in jobs:
            if job.folder.parent in failed:
                continue
            try:
                if experiment(job.recipe, job.folder, self.device, self.console) is None:
                    raise KeyboardInterrupt
            except NotFinite:
                diverged(job)
                tell(job, "diverged")
            except IsthmusError as error:
                failed[job.folder.parent] = error
            else:
                tell(job, "done")
        if failed:
            raise next(iter(failed.values()))

    def threads(self) -> int:
        return torch.get_num_threads()


# ---------------------------------------------------------------------------------------------- a child of its own


def threads_of(at_once: int) -> int:
    """What each of so many runs gets of this machine's cores."""
    return max(1, torch.get_num_threads() // at_once)


def prepared(job: Job) -> Path:
    """The recipe file beside a job's folder, written."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    file = job.folder.with_name(job.folder.name + ".json")
    job.recipe.save(file)
    return file


def spawn(file: Path, folder: Path, device: str, threads: int, lock: int) -> subprocess.Popen[bytes]:
    """`isthmus train` on a recipe file, in a process group of its own: the terminal's Ctrl-C comes once, through us.

    Args:
        lock: a descriptor that it holds until it ends, even if this process is killed.
    """
    words = ["train", str(file), "--out", str(folder), "--device", device]
    with log_of(folder).open("wb") as stream:  # of an earlier try, it would tell another end than this one's
        return subprocess.Popen(
            [sys.executable, "-m", "isthmus", *words],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            pass_fds=(lock,),
            process_group=0,
        )


def log_of(folder: Path) -> Path:
    """What the child of a run's folder printed."""
    return folder.with_name(folder.name + ".log")


def judged(job: Job, code: int, tell: Tell) -> IsthmusError | None:
    """Tell how a child ended, or return what went wrong."""
    if code == 0:
        tell(job, "done")
        return None
    if code == NotFinite.code:
        diverged(job)
        tell(job, "diverged")
        return None
    log = log_of(job.folder)
    return IsthmusError(
        f"{job.label} ended with exit code {code}: {_last_words(log)}",
        f"see {log}; the same command goes on with what is missing",
    )


def diverged(job: Job) -> None:
    """Write down that a job ends in numbers that are not finite, so that it is not tried again."""
    write_text(job.folder / "diverged", "")


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[int]:
    """The comparison's lock; waits while another process, or a child that outlived its parent, holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with locks.held(
        folder / "lock", lambda: say(f"{folder} is in use by another process or its runs; waiting")
    ) as lock:
        yield lock


def _last_words(log: Path) -> str:
    """The error that a child printed, else its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]
