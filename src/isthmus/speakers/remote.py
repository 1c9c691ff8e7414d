"""A model behind an OpenAI-compatible endpoint as a Speaker: closed models, and servers of open ones on this machine.

For use as teacher, judge, planner and baseline. It gives text and nothing else: no features, no probabilities.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Lock
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

from isthmus.speakers.cache import Answer, Cache, key_of
from isthmus.speakers.endpoint import LONGEST_COMPLAINT, Endpoint, Refused
from isthmus.speakers.settings import RemoteConfig
from isthmus.speakers.usage import Meter, Usage
from isthmus.speakers.wire import messages
from isthmus.types import Sample, Turn

Result = TypeVar("Result")


class Remote:
    """Speaks with a model over the network. Several threads may use one at the same time.

    Args:
        config: which model, where, and what it may cost.
        say: is told about damaged entries of the cache.
    """

    def __init__(self, config: RemoteConfig, say: Callable[[str], None] = warnings.warn):
        self.config = config
        self.cache = Cache(config.cache, say) if config.cache else None
        self._meter, self._lock = Meter(config), Lock()
        self._endpoint = Endpoint(config, self._meter)
        self._asked: WeakValueDictionary[str, Lock] = WeakValueDictionary()

    @property
    def usage(self) -> Usage:
        """The totals so far."""
        return self._meter.usage

    def say(self, turns: Sequence[Turn]) -> str:
        """The answer to a conversation that ends with the user.

        Raises:
            DataError: the conversation cannot be sent.
            ConfigError: the key is missing or wrong, or there is no such model.
            Refused: the model, or a filter of its provider, declined.
            IsthmusError: the budget is spent, the endpoint does not answer, or not as the protocol says.
        """
        return _text(self._answer(turns))

    def say_all(self, samples: Sequence[Sample]) -> list[str]:
        """Answers to several conversations, `concurrency` at a time, in their order.

        Raises:
            As `say`. After the first error nothing more is sent; what is on its way is awaited and kept in the cache.
        """
        return self._all(lambda sample: self.say(sample.turns), samples)

    def replies(self, samples: Sequence[Sample]) -> list[str | None]:
        """As `say_all`, with None where the model or its provider declined to answer."""

        def reply(sample: Sample) -> str | None:
            try:
                return self.say(sample.turns)
            except Refused:
                return None

        return self._all(reply, samples)

    def stream(self, turns: Sequence[Turn]) -> Iterator[str]:
        """The answer in pieces as it comes; in one piece from the cache. Raises as `say`."""
        request, key = self._request(turns)
        known = self._known(key)
        if known is not None:
            yield _text(known)
            return
        self._meter.afford()
        answer = yield from self._endpoint.stream(request)
        self._keep(key, request, answer)
        _text(answer)

    def close(self) -> None:
        """Give the connections back."""
        self._endpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ one answer

    def _answer(self, turns: Sequence[Turn]) -> Answer:
        request, key = self._request(turns)
        with self._alone(key):
            known = self._known(key)
            if known is not None:
                return known
            self._meter.afford()
            answer = self._endpoint.ask(request)
            self._keep(key, request, answer)
            return answer

    def _request(self, turns: Sequence[Turn]) -> tuple[dict[str, Any], str]:
        """The body of a request, and its name in the cache."""
        body = self.config.request() | {"messages": messages(turns, self.config.picture)}
        return body, key_of({"endpoint": self.config.endpoint, "body": body})

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Equal requests one after the other, so that the second finds the first one's answer."""
        with self._lock:
            own = self._asked.setdefault(key, Lock())
        with own:
            yield

    def _known(self, key: str) -> Answer | None:
        answer = self.cache.get(key) if self.cache else None
        if answer is not None:
            self._meter.cached()
        return answer

    def _keep(self, key: str, request: dict[str, Any], answer: Answer) -> None:
        if self.cache:
            self.cache.put(key, {"endpoint": self.config.endpoint, "body": request}, answer)

    def _all(self, ask: Callable[[Sample], Result], samples: Sequence[Sample]) -> list[Result]:
        pool = ThreadPoolExecutor(self.config.concurrency, "remote")
        try:
            waiting = [pool.submit(ask, sample) for sample in samples]
            wait(waiting, return_when=FIRST_EXCEPTION)
        finally:  # after an error or an interruption, what has not been sent is not paid for
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in waiting]


def _text(answer: Answer) -> str:
    """What was said.

    Raises:
        Refused: nothing was.
    """
    if answer.refusal is not None:
        why = " ".join(answer.refusal.split())[:LONGEST_COMPLAINT]
        raise Refused(f"{answer.model or 'the model'} refused: {why}", "rephrase the question, or leave this item out")
    return answer.text.strip()
