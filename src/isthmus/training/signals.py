"""Ctrl-C and SIGTERM as a request: work that takes long comes to an end that it can go on from."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interrupts(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM finish the step; Ctrl-C after either stops at once. Yields whether one has come.

    Another SIGTERM asks for nothing new: a scheduler and a launcher may each pass on the same one. Only the main thread
    gets signals; elsewhere nothing is changed.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        if len(asked) == 1:
            with contextlib.suppress(RuntimeError):  # it came amid a line that is being printed
                say("finishing this step and saving; Ctrl-C stops at once")

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
