"""Requests on their way through the engine, what is told of them, and why they fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from isthmus.serving.prompts import Prompt
from isthmus.serving.sampling import Chosen, Sampler, Settings
from isthmus.serving.speech import Speech
from isthmus.types import IsthmusError


class Full(IsthmusError):
    """So many requests wait already that another is refused."""


class Stopping(IsthmusError):
    """The engine takes nothing more: it is closing, or its thread has ended."""


class TooLong(IsthmusError):
    """A prompt leaves no room for an answer in the context."""


class Late(IsthmusError):
    """A request ran out of time."""


class Broken(IsthmusError):
    """The model failed on a request; what exactly stands in the log."""


@dataclass(frozen=True)
class Piece:
    """More of an answer: text that is sure, and the tokens since the last piece."""

    index: int
    text: str
    chosen: tuple[Chosen, ...] = ()


@dataclass(frozen=True)
class Done:
    """An answer has ended: by itself or at a stop string, or because no more tokens were allowed."""

    index: int
    reason: Literal["stop", "length"]
    tokens: int
    reused: int
    """Tokens of the prompt that were known from earlier."""
    ids: tuple[int, ...] = ()
    """All tokens of the answer, the one that ended it among them."""


@dataclass(frozen=True)
class Failed:
    """The whole request failed; nothing more is told of it."""

    error: IsthmusError


Event: TypeAlias = Piece | Done | Failed
Listener: TypeAlias = Callable[[Event], object]


@dataclass(repr=False, eq=False)
class Job:
    """One request."""

    prompt: Prompt
    settings: Settings
    listener: Listener
    tokenizer: PreTrainedTokenizerBase
    began: float = field(default_factory=time.monotonic)
    ended: int = 0
    over: bool = False
    failed: bool = False
    cancelled: bool = False

    @property
    def late(self) -> bool:
        deadline = self.settings.deadline
        return deadline is not None and time.monotonic() - self.began > deadline

    def cancel(self) -> None:
        """Nobody waits for the answer any more; its rows leave before the next step."""
        self.cancelled = True

    async def let_go(self) -> None:
        """`cancel`, for whom an event loop asks: it would give a plain function a thread of its own."""
        self.cancel()

    def end(self, done: Done) -> None:
        """One answer has ended; with the last one the request is over."""
        self.ended += 1
        self.over = self.over or self.ended == self.settings.n
        self.tell(done)

    def fail(self, error: IsthmusError) -> None:
        if not self.over:
            self.over = self.failed = True
            self.tell(Failed(error))

    def tell(self, event: Event) -> None:
        """Tell the listener, and nothing after a failure; one that cannot hear any more has gone."""
        if self.failed and not isinstance(event, Failed):
            return
        try:
            self.listener(event)
        except Exception:  # whatever a stranger's function raises must not reach the loop
            self.cancel()


class Answer:
    """One answer of a request while it grows."""

    def __init__(self, job: Job, number: int, limit: int, ends: Sequence[int], reused: int):
        self.job, self.number, self.limit, self.ends, self.reused = job, number, limit, ends, reused
        self.sampler = Sampler(job.settings, number)
        self.speech = Speech(job.tokenizer, job.settings.stop)
        self.ids: list[int] = []
        self._untold: list[Chosen] = []

    @property
    def last(self) -> int:
        return self.ids[-1]

    def advance(self, logits_V: Tensor) -> bool:
        """Choose the next token and tell what is sure; whether the answer has ended.

        Raises:
            ArithmeticError: the logits are not numbers, or the grammar allows nothing.
        """
        chosen = self.sampler.choose(logits_V, self.ends)
        self.ids.append(chosen.token)
        ended = chosen.token in self.ends
        said = ""
        if not ended:
            self._untold.append(chosen)
            said = self.speech.hear(chosen.token)
            matcher = self.sampler.matcher
            ended = self.speech.stopped or (matcher is not None and matcher.done)
        cut = not ended and len(self.ids) >= self.limit
        if ended or cut:
            said += self.speech.end()
        if said or (self._untold and (ended or cut)):
            self.job.tell(Piece(self.number, said, tuple(self._untold)))
            self._untold = []
        if ended or cut:
            reason: Literal["stop", "length"] = "length" if cut and not self.speech.stopped else "stop"
            self.job.end(Done(self.number, reason, len(self.ids), self.reused, tuple(self.ids)))
        return ended or cut
