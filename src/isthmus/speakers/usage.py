"""What a remote speaker was asked, what it cost, and whether there is money for more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock

from isthmus.speakers.cache import Answer
from isthmus.speakers.settings import RemoteConfig
from isthmus.types import IsthmusError


@dataclass(frozen=True)
class Usage:
    """Totals. Answers from the cache cost nothing."""

    requests: int = 0
    """Those that a reply came to, whole or not."""
    cached: int = 0
    retried: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    unmetered: int = 0
    """Requests whose tokens were not told: the endpoint does not, or the reply broke off. They are not in the cost."""

    def __str__(self) -> str:
        tokens = f"{self.input_tokens:,} tokens in, {self.output_tokens:,} out"
        cost = f", cost {self.cost:.4g}" if self.cost else ""
        unmetered = f", {self.unmetered} requests with tokens untold" if self.unmetered else ""
        return f"{self.requests} requests, {self.cached} answers from the cache, {tokens}{cost}{unmetered}"


class Meter:
    """Counts for many threads at once."""

    def __init__(self, config: RemoteConfig):
        self.config, self._usage, self._lock = config, Usage(), Lock()

    @property
    def usage(self) -> Usage:
        return self._usage

    def cached(self) -> None:
        self._add(cached=1)

    def retried(self) -> None:
        self._add(retried=1)

    @contextmanager
    def replying(self) -> Iterator[Callable[[Answer], None]]:
        """Around the reading of one reply, which is told when it is whole; it counts however that ends."""
        whole: list[Answer] = []
        try:
            yield whole.append
        finally:
            answer = whole[0] if whole else None
            if answer is None or answer.input_tokens is None or answer.output_tokens is None:
                self._add(requests=1, unmetered=1)
            else:
                cost = self.config.cost(answer.input_tokens, answer.output_tokens)
                self._add(requests=1, input_tokens=answer.input_tokens, output_tokens=answer.output_tokens, cost=cost)

    def afford(self) -> None:
        """Nothing, if another request may be sent.

        Raises:
            IsthmusError: the budget is spent, or cannot be kept.
        """
        budget, usage = self.config.budget, self._usage
        if budget is None:
            return
        if usage.cost >= budget:
            raise IsthmusError(
                f"the budget of {budget:g} is spent: {usage}",
                f"raise budget and ask again: the answers so far are in {self.config.cache}",
            )
        if usage.unmetered:
            raise IsthmusError(
                f"the budget of {budget:g} cannot be kept: {usage}", "leave out budget, and watch the provider's bill"
            )

    def _add(self, **more: float) -> None:
        with self._lock:
            self._usage = replace(
                self._usage, **{name: vars(self._usage)[name] + count for name, count in more.items()}
            )
