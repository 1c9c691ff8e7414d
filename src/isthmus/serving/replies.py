"""Answers in the form of OpenAI's protocol, whole or as a stream of chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from isthmus.serving import tools as toolbox
from isthmus.serving.answers import Done, Piece
from isthmus.serving.refusals import Refusal
from isthmus.serving.sampling import Chosen
from isthmus.serving.spelling import Spelling


@dataclass
class Growing:
    """One answer so far; `spelled` are its tokens with their log-probabilities, where these are told."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    spelled: list[dict[str, Any]] = field(default_factory=list)
    done: Done | None = None


class Reply:
    """The answers to one request.

    Args:
        model: the name that the client used.
        prompt_tokens: with those that stand for pictures.
        n: how many answers.
        tools: names of tools whose calls are looked for; where there are some, an answer is told when it is whole.
        tokenizer: spells tokens in log-probabilities.
        logprobs: whether they are told.
        ids: the prompt's tokens where token ids are told, as vLLM tells them; else None.
    """

    def __init__(
        self,
        model: str,
        prompt_tokens: int,
        n: int,
        tools: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        logprobs: bool,
        ids: Sequence[int] | None = None,
    ):
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.model, self.prompt_tokens, self.tools = model, prompt_tokens, list(tools)
        self.spelling, self.logprobs, self.ids = Spelling(tokenizer), logprobs, ids
        self.answers = [Growing() for _ in range(n)]

    @property
    def whole(self) -> bool:
        return all(answer.done is not None for answer in self.answers)

    @property
    def told(self) -> int:
        """Tokens of the answers that have ended."""
        return sum(answer.done.tokens for answer in self.answers if answer.done is not None)

    def hear(self, event: Piece | Done) -> Iterator[dict[str, Any]]:
        """Take in what the engine tells; the chunks that follow from it."""
        answer = self.answers[event.index]
        if isinstance(event, Piece):
            answer.text += event.text
            ids = [chosen.token for chosen in event.chosen]
            answer.ids += ids
            spelled = self._spell(event.chosen, begins=not answer.spelled)
            answer.spelled += spelled
            if not self.tools:
                yield self._chunk(event.index, {"content": event.text}, None, spelled, ids)
            return
        answer.done = event
        message, reason = self._message(answer)
        if self.tools:
            delta = {"content": message["content"]} if message["content"] is not None else {}
            if calls := message.get("tool_calls"):
                delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(calls)]
            yield self._chunk(event.index, delta, None, answer.spelled, answer.ids)
        yield self._chunk(event.index, {}, reason, ids=event.ids[len(answer.ids) :])

    def opening(self) -> Iterator[dict[str, Any]]:
        """The first chunk of each answer."""
        for index in range(len(self.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None) | self._prompt_ids

    def closing(self) -> dict[str, Any]:
        """The chunk that tells the usage."""
        return self._frame("chat.completion.chunk") | {"choices": [], "usage": self.usage}

    def body(self) -> dict[str, Any]:
        """The whole reply."""
        choices = []
        for index, answer in enumerate(self.answers):
            message, reason = self._message(answer)
            logprobs = self._logprobs(answer.spelled)
            choice = {"index": index, "message": message, "finish_reason": reason, "logprobs": logprobs}
            assert answer.done is not None
            choices.append(choice | self._token_ids(answer.done.ids))
        return self._frame("chat.completion") | {"choices": choices, "usage": self.usage} | self._prompt_ids

    @property
    def _prompt_ids(self) -> dict[str, Any]:
        return {} if self.ids is None else {"prompt_token_ids": list(self.ids)}

    def _token_ids(self, ids: Sequence[int]) -> dict[str, Any]:
        return {} if self.ids is None else {"token_ids": list(ids)}

    @property
    def usage(self) -> dict[str, Any]:
        told = self.told
        reused = next((answer.done.reused for answer in self.answers if answer.done is not None), 0)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": told,
            "total_tokens": self.prompt_tokens + told,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _message(self, answer: Growing) -> tuple[dict[str, Any], str]:
        """The message and why it ended; one that was cut has ended for that, whatever it calls."""
        assert answer.done is not None
        text, calls = toolbox.calls(answer.text, self.tools) if self.tools else (answer.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if not calls:
            return message, answer.done.reason
        reason = "length" if answer.done.reason == "length" else "tool_calls"
        return message | {"content": text or None, "tool_calls": calls}, reason

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        reason: str | None,
        spelled: Sequence[dict[str, Any]] = (),
        ids: Sequence[int] = (),
    ) -> dict[str, Any]:
        logprobs = self._logprobs(spelled) if spelled else None
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        return self._frame("chat.completion.chunk") | {"choices": [choice | self._token_ids(ids)]}

    def _logprobs(self, spelled: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": list(spelled), "refusal": None} if self.logprobs else None

    def _spell(self, chosen: Sequence[Chosen], begins: bool) -> list[dict[str, Any]]:
        """Tokens with their log-probabilities and the likeliest others; `begins` with the first of the answer."""
        if not self.logprobs:
            return []
        content = []
        for place, one in enumerate(chosen):
            first = begins and not place
            top = [self._spelled(*other, first) for other in one.top]
            content.append(self._spelled(one.token, one.logprob, first) | {"top_logprobs": top})
        return content

    def _spelled(self, token: int, logprob: float | None, first: bool) -> dict[str, Any]:
        text, raw = self.spelling(token, first)
        value = None if logprob is None else max(logprob, -9999.0)
        return {"token": text, "logprob": value, "bytes": None if raw is None else list(raw)}


def event(data: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def failed(refusal: Refusal) -> bytes:
    """What ends a stream that failed on its way."""
    return event(refusal.body)


END = b"data: [DONE]\n\n"
