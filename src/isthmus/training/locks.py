"""Who may work in a folder: one process at a time, known by a lock that the system takes back when it ends.

Even SIGKILL gives a lock free. Where a disk or a system knows no locks, nobody is kept out.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from isthmus.files import writing
from isthmus.training.parallel import World
from isthmus.types import ConfigError

_OWN: set[IO[str]] = set()


@contextlib.contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """No other run trains in this folder meanwhile; of processes that train together, the first one sees to it.

    Raises:
        ConfigError: one trains there already.
        IsthmusError: the folder cannot be written.
    """

    def refuse() -> None:
        raise ConfigError(f"another process trains in {folder}", "wait for its end, or name another folder with --out")

    with contextlib.ExitStack() as until_the_end:

        def take() -> None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                until_the_end.enter_context(held(folder / "lock", refuse))

        world.lead(take)
        yield


@contextlib.contextmanager
def held(path: Path, wait: Callable[[], None]) -> Iterator[int]:
    """The descriptor of a lock file that nobody else holds; `wait` is called where somebody still does.

    A process that is started with the descriptor holds the lock as well; one that is merely forked does not.
    """
    with path.open("w") as file:
        if not _take(file.fileno()):
            wait()
            while not _take(file.fileno()):
                time.sleep(1)
        _OWN.add(file)
        try:
            yield file.fileno()
        finally:
            _OWN.discard(file)


def taken(path: Path) -> bool:
    """Whether somebody holds a lock file now."""
    if not path.is_file():
        return False
    with path.open() as file:
        return not _take(file.fileno(), shared=True)


def _take(descriptor: int, shared: bool = False) -> bool:
    try:
        import fcntl  # here, because not every system has it

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _leave() -> None:
    """A forked process has no share in its parent's locks, which would outlive the parent in it."""
    for file in _OWN:
        file.close()
    _OWN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)
