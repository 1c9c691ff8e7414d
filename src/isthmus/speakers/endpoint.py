"""One OpenAI-compatible chat endpoint: requests with a key from the environment, retries, and failures in two lines."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import chain, count
from typing import Any, TypeVar

import httpx2

from isthmus.speakers import replies
from isthmus.speakers.cache import Answer
from isthmus.speakers.replies import Growing, Malformed, Piece, Reply
from isthmus.speakers.settings import HERE, RemoteConfig
from isthmus.speakers.usage import Meter
from isthmus.types import ConfigError, IsthmusError

Result = TypeVar("Result")
RETRIED = frozenset({408, 409, 429})
FILTERS = frozenset({"content_filter", "content_policy_violation"})
SPENT = frozenset({"insufficient_quota"})
"""Comes with 429 like a rate limit, but no waiting helps."""
LONGEST_COMPLAINT = 200
_DIRECT: dict[str, httpx2.BaseTransport | None] = {
    f"all://{f'[{host}]' if ':' in host else host}": None for host in sorted(HERE)
}
"""Hosts that no proxy of the environment comes between: a key goes to them unencrypted, and must not leave."""


class Refused(IsthmusError):
    """The model, or a filter of its provider, declined to answer."""


class Passing(Exception):
    """A failure that another attempt may not meet; `wait` is how many seconds the server asks for."""

    def __init__(self, cause: str, remedy: str, wait: float | None = None) -> None:
        super().__init__(cause)
        self.cause, self.remedy, self.wait = cause, remedy, wait


class Endpoint:
    """Sends requests. The key is read for each of them and kept nowhere; redirects are not followed, nor is it.

    Args:
        config: where and how.
        meter: is told of retries and replies.
    """

    def __init__(self, config: RemoteConfig, meter: Meter):
        self.config, self.meter = config, meter
        self.name = f"{config.model} at {config.endpoint}"
        self.dice = random.Random()
        self.client = httpx2.Client(
            timeout=httpx2.Timeout(config.timeout, pool=None),
            limits=httpx2.Limits(max_connections=config.concurrency),
            mounts=_DIRECT,
        )

    def ask(self, body: dict[str, Any]) -> Answer:
        """The whole answer.

        Raises:
            ConfigError: the key is missing or wrong, or there is no such model.
            Refused: a filter stopped the request.
            IsthmusError: anything else that went wrong, after the retries that it allows.
        """
        text = self.fetch(body)
        with self.meter.replying() as whole, self._strict():
            answer = replies.answer(replies.read(Reply, text))
            whole(answer)
        return answer

    def fetch(self, body: dict[str, Any]) -> str:
        """The reply as it came. Raises as `ask`, but for what the reply says."""
        return self._persist(lambda: self._send(body)).text

    def stream(self, body: dict[str, Any]) -> Generator[str, None, Answer]:
        """Pieces of the answer as they come; returns the whole. Attempts end with the first piece.

        Raises:
            As `ask`, and IsthmusError where the connection is lost on the way.
        """
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        response, events = self._persist(lambda: self._open(asked))
        with closing(response), self.meter.replying() as whole:
            growing = Growing()
            for data in self._surviving(events):
                if data.strip() == "[DONE]":
                    break
                with self._strict():
                    added = growing.add(replies.read(Piece, data))
                if added:
                    yield added
            else:
                if not growing.finish:
                    raise self._lost()
            with self._strict():
                answer = growing.answer()
            whole(answer)
        return answer

    def close(self) -> None:
        self.client.close()

    # ------------------------------------------------------------------------------------------ one attempt

    def _send(self, body: dict[str, Any]) -> httpx2.Response:
        with self._translated():
            response = self.client.send(self._request(body))
            self._check(response)
            return response

    def _open(self, body: dict[str, Any]) -> tuple[httpx2.Response, Iterator[httpx2.ServerSentEvent]]:
        """A stream whose first event has come."""
        with self._translated():
            response = self.client.send(self._request(body), stream=True)
            try:
                if not response.is_success:
                    response.read()
                self._check(response)
                events = iter(httpx2.EventSource(response))
                first = next(events, None)
                if first is None:
                    raise Passing("closed the connection before it answered", "look at the server's log")
                return response, chain([first], events)
            except BaseException:
                response.close()
                raise

    def _request(self, body: dict[str, Any]) -> httpx2.Request:
        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.client.build_request("POST", f"{self.config.endpoint}/chat/completions", json=body, headers=headers)

    def _key(self) -> str:
        """The key, or nothing where none is needed."""
        variable = self.config.key_env
        if variable is None:
            return ""
        key = os.environ.get(variable, "").strip()
        if not key:
            raise ConfigError(f"the environment variable {variable} holds no key", f"export {variable}=..., then again")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ConfigError(
                f"what {variable} holds cannot be a key", "it has blanks or odd characters; copy it again"
            )
        return key

    # ------------------------------------------------------------------------------------------ failures

    def _persist(self, attempt: Callable[[], Result]) -> Result:
        """The attempt's result, after as many attempts as the config allows."""
        for failures in count():
            try:
                return attempt()
            except Passing as passing:
                found = passing
            if failures >= self.config.retries:
                times = f" ({failures + 1} attempts)" if failures else ""
                raise IsthmusError(f"{self.name}: {found.cause}{times}", found.remedy)
            wait = self._pause(failures) if found.wait is None else found.wait
            if wait > self.config.longest_wait:
                raise IsthmusError(
                    f"{self.name}: {found.cause}, and asks for a pause of {wait:.0f} s",
                    "come back then, or raise longest_wait",
                )
            self.meter.retried()
            time.sleep(wait)
        raise AssertionError("count() never ends")

    def _pause(self, failures: int) -> float:
        """Doubling, with up to half of it taken off by chance so that many askers do not return at once."""
        longest = min(self.config.backoff * 2**failures, self.config.longest_wait)
        return longest * self.dice.uniform(0.5, 1)

    def _check(self, response: httpx2.Response) -> None:
        """Turn a reply that is no success into what went wrong."""
        if response.is_success:
            return
        message, code = replies.complaint(response.text)
        status, said = response.status_code, f"HTTP {response.status_code}: {self._plain(message)}"
        if code in FILTERS:
            raise Refused(f"{self.name}: refused ({said})", "rephrase the question, or leave this item out")
        if (status in RETRIED or status >= 500) and code not in SPENT:
            raise Passing(said, "wait, lower concurrency, or look at the server's log", _retry_after(response))
        kind, remedy = self._remedy(status)
        raise kind(f"{self.name}: {said}", remedy)

    def _remedy(self, status: int) -> tuple[type[IsthmusError], str]:
        variable = self.config.key_env
        if status in (401, 403):
            return ConfigError, f"check the key in {variable}" if variable else "name the key's variable in key_env"
        remedies: dict[int, tuple[type[IsthmusError], str]] = {
            402: (IsthmusError, "pay, or use another endpoint"),
            404: (ConfigError, "check the model's name, and that the endpoint ends where /chat/completions begins"),
            413: (IsthmusError, "lower picture.side, or send JPEG"),
            429: (IsthmusError, "the account has no credit left: top it up, or use another key"),
        }
        if 300 <= status < 400:
            return ConfigError, "name the address that it points to; redirects are not followed"
        return remedies.get(status, (IsthmusError, "change what it names: max_tokens, temperature, options, picture"))

    def _plain(self, text: str) -> str:
        """A server's words in one line of bounded length, without the key that it may have echoed."""
        key = self._key()
        line = " ".join(text.split())
        line = line.replace(key, "[key]") if key else line
        return line[:LONGEST_COMPLAINT] + "…" * (len(line) > LONGEST_COMPLAINT)

    @contextmanager
    def _strict(self) -> Iterator[None]:
        try:
            yield
        except Malformed as error:
            raise IsthmusError(
                f"{self.name}: the reply is malformed ({self._plain(str(error))})",
                "is it an OpenAI-compatible chat endpoint? raise max_tokens if the answer had no room",
            ) from None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """What the HTTP library raises, as a failure that passes or one that does not."""
        try:
            yield
        except (httpx2.ReadTimeout, httpx2.WriteTimeout):  # not asked again: the answer may be on its way, and paid
            raise IsthmusError(
                f"{self.name}: silent for {self.config.timeout:g} s", "raise timeout, or lower max_tokens"
            ) from None
        except httpx2.SSEError:
            raise IsthmusError(f"{self.name}: does not stream", "ask for whole answers with say") from None
        except httpx2.TransportError as error:
            raise Passing(
                f"no connection ({self._plain(str(error)) or type(error).__name__})",
                "check the address, that the server runs, and the network",
            ) from None
        except httpx2.HTTPError as error:
            raise IsthmusError(f"{self.name}: {self._plain(str(error))}", "is it a chat endpoint?") from None

    def _surviving(self, events: Iterator[httpx2.ServerSentEvent]) -> Iterator[str]:
        """The data of events; a connection that is lost now is an error, for pieces have been handed on."""
        try:
            with self._translated():
                for event in events:
                    yield event.data
        except Passing:
            raise self._lost() from None

    def _lost(self) -> IsthmusError:
        return IsthmusError(f"{self.name}: the connection was lost in the middle of the answer", "ask again")


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks for, as a number or until a date; None where it says nothing sensible."""
    asked = response.headers.get("retry-after", "")
    if asked.isascii() and asked.replace(".", "", 1).isdigit():
        return float(asked)
    try:
        until = parsedate_to_datetime(asked)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
