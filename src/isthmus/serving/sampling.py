"""How the next token is chosen: greedily or by lot, each answer with a generator of its own, so that company in the
batch changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from isthmus.serving.grammar import Grammar

COLD = 1e-5
"""Temperatures below it take the likeliest token: logits over them may be no numbers any more."""


@dataclass(frozen=True)
class Settings:
    """What one request asks of the engine.

    Attributes:
        max_tokens: the longest answer; what the context has left is the limit anyway.
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability.
        stop: strings that end an answer.
        n: answers to the same prompt; the i-th draws with seed + i.
        seed: None draws anew each time.
        logprobs: None, or how many alternatives each token's log-probability is told beside.
        grammar: what answers must look like.
        deadline: seconds from submission after which the request fails.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability under the model alone, and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Sampler:
    """Chooses the tokens of one answer."""

    settings: Settings
    number: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((self.settings.seed + self.number) % (1 << 63))
        self.matcher = self.settings.grammar.begin() if self.settings.grammar is not None else None

    def choose(self, logits_V: Tensor, ends: Sequence[int]) -> Chosen:
        """The next token from its logits on the CPU, in float32.

        Raises:
            ArithmeticError: they are not numbers.
        """
        if not bool(logits_V.isfinite().any()) or bool(logits_V.isnan().any()):
            raise ArithmeticError("the model's logits are not numbers")
        free_V = logits_V
        if self.settings.presence_penalty or self.settings.frequency_penalty:
            logits_V = self._penalised(logits_V)
        if self.matcher is not None:
            logits_V = self.matcher.allow(logits_V, ends)
        token = int(logits_V.argmax()) if self.settings.temperature < COLD else self._draw(logits_V)
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.matcher is not None:
            self.matcher.take(token)
        return self._told(token, free_V)

    def _penalised(self, logits_V: Tensor) -> Tensor:
        ids = torch.tensor(list(self.counts), dtype=torch.long)
        times = torch.tensor(list(self.counts.values()), dtype=logits_V.dtype)
        away = self.settings.presence_penalty + self.settings.frequency_penalty * times
        return logits_V.index_add(0, ids, -away) if len(ids) else logits_V

    def _draw(self, logits_V: Tensor) -> int:
        weights_V = (logits_V / self.settings.temperature).softmax(-1)
        if self.settings.top_p < 1:
            ordered_V, ids_V = weights_V.sort(descending=True, stable=True)
            kept_V = ordered_V.cumsum(0) - ordered_V < self.settings.top_p
            kept_V[0] = True  # also where float32 has no number as small as top_p
            weights_V = torch.zeros_like(weights_V).scatter(0, ids_V[kept_V], ordered_V[kept_V])
        return int(torch.multinomial(weights_V, 1, generator=self.generator))

    def _told(self, token: int, logits_V: Tensor) -> Chosen:
        if self.settings.logprobs is None:
            return Chosen(token)
        logprobs_V = logits_V.log_softmax(-1)
        values, ids = logprobs_V.topk(self.settings.logprobs) if self.settings.logprobs else ((), ())
        top = tuple((int(i), float(v)) for i, v in zip(ids, values))
        return Chosen(token, float(logprobs_V[token]), top)
