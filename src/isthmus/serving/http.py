"""The HTTP in front of the engine: OpenAI's routes, who may use them, and how much of anything they take in.

A request's contents are looked at beside the event loop (`bodies`), which itself only moves bytes. A client that goes
away takes its answer out of the batch.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from isthmus.serving import browser, description, embeddings, journal, protocol, replies
from isthmus.serving.answers import Event, Failed, Job, TooLong
from isthmus.serving.bodies import Bodies
from isthmus.serving.door import Door
from isthmus.serving.engine import Engine
from isthmus.serving.fetching import Fetcher
from isthmus.serving.grammar import Grammars
from isthmus.serving.intake import Intake
from isthmus.serving.limits import Limits
from isthmus.serving.metrics import Metrics
from isthmus.serving.prompts import Prompt
from isthmus.serving.refusals import Refusal, invalid, left, refusal
from isthmus.serving.sampling import Settings
from isthmus.types import ConfigError, DataError, IsthmusError, Turn

Result = TypeVar("Result")
CHAT = "/v1/chat/completions"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Who may ask, and how the server is called.

    Attributes:
        key: what `Authorization: Bearer` must say; None lets everybody in who reaches the port.
        hosts: names in the Host header that are answered; a page of another name cannot reach a local server then.
    """

    key: str | None = None
    hosts: frozenset[str] = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass
class Server:
    """One engine behind HTTP; `app()` is what an ASGI server runs."""

    engine: Engine
    name: str
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    fetch: Fetcher = field(default_factory=Fetcher)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)
        self.grammars = Grammars(self.engine.model.processor.tokenizer)
        self.bodies = Bodies(self.limits, self.engine.sizes.queue)
        self.began = int(time.time())

    def app(self) -> FastAPI:
        """The application: routes with a key, and `/health` without one."""
        app = FastAPI(title="Isthmus", docs_url=None, redoc_url=None, openapi_url=None)
        guarded = APIRouter(dependencies=[Depends(self.authorise)])
        guarded.add_api_route(CHAT, self.chat, methods=["POST"])
        guarded.add_api_route("/v1/embeddings", self.embed, methods=["POST"])
        guarded.add_api_route("/v1/models", self.models, methods=["GET"])
        guarded.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        guarded.add_api_route("/metrics", self.scrape, methods=["GET"])
        guarded.add_api_route("/openapi.json", description.document, methods=["GET"])
        guarded.add_api_route("/page/facts", self.facts, methods=["GET"])
        guarded.add_api_route("/page/attention", self.attention, methods=["POST"])
        app.include_router(guarded)
        app.include_router(browser.routes())
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_exception_handler(Refusal, self._refused)
        app.add_exception_handler(IsthmusError, self._refused)
        app.add_exception_handler(HTTPException, self._refused)
        app.add_exception_handler(Exception, self._refused)
        app.add_middleware(Door, hosts=self.access.hosts)
        return app

    async def authorise(self, request: Request) -> None:
        """Compare the key in constant time.

        Raises:
            Refusal: it is missing or wrong.
        """
        if self.access.key is None:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.access.key}".encode()):
            raise Refusal(
                401, "the API key is missing or wrong", "invalid_api_key", None, {"WWW-Authenticate": "Bearer"}
            )

    # ------------------------------------------------------------------------------------ routes

    async def chat(self, request: Request) -> Response:
        began = time.monotonic()
        asked, prompt, settings = await self.bodies.take_in(request, self._understand)
        events: asyncio.Queue[Event] = asyncio.Queue()
        job = self.engine.submit(prompt, settings, _listener(events))
        try:
            first = await self._while_there(request, events.get())
        except BaseException:
            job.cancel()
            raise
        if isinstance(first, Failed):
            raise first.error
        self.metrics.first_token.observe(time.monotonic() - began)
        tools = [tool["name"] for tool in asked.offered]
        tokenizer = self.engine.model.processor.tokenizer
        ids = prompt.ids if asked.return_token_ids else None
        reply = replies.Reply(asked.model, len(prompt.ids), settings.n, tools, tokenizer, bool(asked.logprobs), ids)
        if asked.stream:
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            stream = self._stream(job, first, events, reply, usage, began, len(prompt.seen))
            return StreamingResponse(
                stream,
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
                background=BackgroundTask(job.let_go),  # a stream that nobody began to read has no end of its own
            )
        try:
            await self._while_there(request, _collect(first, events, reply))
        finally:
            job.cancel()  # nothing to an answer that is whole
        self._count("chat", 200, began)
        log.info("%s", journal.answered(reply.prompt_tokens, reply.told, len(prompt.seen), began))
        return JSONResponse(reply.body())

    async def embed(self, request: Request) -> Response:
        began = time.monotonic()
        asked, inputs = await self.bodies.take_in(request, self._understand_inputs)
        task = self.engine.call(lambda: embeddings.embed(self.engine, inputs))
        found = await self._while_there(request, asyncio.wrap_future(task))
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector.tolist(), asked.encoding_format)}
            for index, vector in enumerate(found.vectors)
        ]
        usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
        self._count("embeddings", 200, began)
        log.info("%s", journal.answered(found.tokens, 0, 0, began))
        return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        self._check_name(name)
        return JSONResponse(self._card())

    async def health(self) -> Response:
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def scrape(self) -> Response:
        return Response(self.metrics.text(), media_type=Metrics.content_type)

    async def facts(self) -> Response:
        return JSONResponse(browser.introduction(self.engine.model, self.name, self.limits.tokens))

    async def attention(self, request: Request) -> Response:
        turns = await self.bodies.take_in(request, self._understand_turns)
        task = self.engine.call(lambda: browser.maps(self.engine.model, turns))
        return JSONResponse({"maps": await self._while_there(request, asyncio.wrap_future(task))})

    # ------------------------------------------------------------------------------------ understanding

    def _understand(self, raw: bytes) -> tuple[protocol.ChatRequest, Prompt, Settings]:
        """A chat request as the engine takes it."""
        asked = protocol.read(protocol.ChatRequest, raw)
        self._check_name(asked.model)
        settings = protocol.settings(asked, self.limits, self.grammars, self.engine.sizes.batch)
        route = protocol.route(asked, self.engine.model.aligner.routes)
        turns = protocol.turns(asked, self.limits, self._intake())
        return asked, self._prepared(turns, route), settings

    def _understand_turns(self, raw: bytes) -> list[Turn]:
        asked = protocol.read(protocol.ChatRequest, raw)
        self._check_name(asked.model)
        browser.check_route(asked.route)
        turns = list(protocol.turns(asked, self.limits, self._intake()))
        prompt = self._prepared(turns)  # refuses what the context does not hold
        browser.check_size(self.engine.model, len(prompt.ids), self.limits.attention)
        return turns

    def _prepared(self, turns: Sequence[Turn], route: int | None = None) -> Prompt:
        """The user's turns as the engine reads them.

        Raises:
            Refusal: the model's chat template, or what it reads, has no place for them.
            TooLong: they leave no room for an answer.
        """
        try:
            return self.engine.prepare(turns, route)
        except (ConfigError, DataError) as error:
            raise invalid(error.cause, "messages") from None

    def _understand_inputs(self, raw: bytes) -> tuple[protocol.EmbeddingRequest, list[Any]]:
        asked = protocol.read(protocol.EmbeddingRequest, raw)
        self._check_name(asked.model)
        try:
            return asked, embeddings.prepare(self.engine, list(protocol.embedded(asked, self.limits, self._intake())))
        except DataError as error:
            raise invalid(error.cause, "input") from None
        except TooLong as error:
            raise invalid(error.cause, "input", "context_length_exceeded") from None

    def _intake(self) -> Intake:
        """What takes in the pictures of one request."""
        return Intake(self.limits, self.fetch)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            message = f"no model {journal.named(name)} here; this server has {journal.named(self.name)}"
            raise Refusal(404, message, "model_not_found", "model")

    # ------------------------------------------------------------------------------------ giving out

    async def _stream(
        self,
        job: Job,
        first: Event,
        events: asyncio.Queue[Event],
        reply: replies.Reply,
        usage: bool,
        began: float,
        pictures: int,
    ) -> AsyncIterator[bytes]:
        """Events as they come; whoever stops listening cancels the request."""
        told = left()
        try:
            for chunk in reply.opening():
                yield replies.event(chunk)
            event = first
            while True:
                if isinstance(event, Failed):
                    told = refusal(event.error)
                    yield replies.failed(told)
                    return
                for chunk in reply.hear(event):
                    yield replies.event(chunk)
                if reply.whole:
                    break
                event = await events.get()
            if usage:
                yield replies.event(reply.closing())
            yield replies.END
        finally:
            job.cancel()
            self._count("chat", 200 if reply.whole or told.status == 499 else told.status, began)
            whole = journal.answered(reply.prompt_tokens, reply.told, pictures, began)
            log.info("%s", whole if reply.whole else journal.refused(told.status, CHAT, told.code))

    async def _while_there(
        self, request: Request, work: Coroutine[Any, Any, Result] | asyncio.Future[Result]
    ) -> Result:
        """Wait for something as long as the client does.

        Raises:
            Refusal: the client has gone, and nobody will read this.
        """
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise left()
            return await working
        finally:
            working.cancel()
            gone.cancel()

    async def _refused(self, request: Request, error: Exception) -> Response:
        """An error in the protocol's form; of what is not ours, only the log says more."""
        told = refusal(error)
        if told.status == 500:
            log.error("a request failed: %s", type(error).__name__, exc_info=error)
        log.info("%s", journal.refused(told.status, request.scope["path"], told.code))
        self.metrics.requests.labels("refused", str(told.status)).inc()
        return JSONResponse(told.body, told.status, told.headers)

    def _count(self, route: str, status: int, began: float) -> None:
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.whole.observe(time.monotonic() - began)

    def _card(self) -> dict[str, Any]:
        context = self.engine.context
        return {"id": self.name, "object": "model", "created": self.began, "owned_by": "isthmus", "context": context}

    def close(self) -> None:
        self.bodies.close()


def _listener(events: asyncio.Queue[Event]) -> Callable[[Event], None]:
    """From the engine's thread into the event loop; raises once that is closed."""
    loop = asyncio.get_running_loop()

    def hear(event: Event) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    return hear


async def _collect(first: Event, events: asyncio.Queue[Event], reply: replies.Reply) -> None:
    """Hear everything.

    Raises:
        IsthmusError: the request failed.
    """
    event = first
    while True:
        if isinstance(event, Failed):
            raise event.error
        for _ in reply.hear(event):
            pass
        if reply.whole:
            return
        event = await events.get()


async def _disconnected(request: Request) -> None:
    """Return when the client has gone; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encoded(vector: list[float], form: str | None) -> list[float] | str:
    """Numbers, or their little-endian float32 bytes in base64, as OpenAI's client asks for by itself."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector
