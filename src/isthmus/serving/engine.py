"""The scheduler: one thread reads prompts and decodes all running answers together, a token each, as they come and go.

Each turn of the loop takes in what was asked, does at most one task of another kind, reads at most a chunk of prompts,
one after the other, and then gives every running answer its next token. So a long prompt delays the others by a chunk,
a newcomer waits for a step and not for an answer, and a cancelled answer leaves before the next step. A request that
fails takes nobody with it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch

from isthmus.model import VLM
from isthmus.serving.answers import Answer, Broken, Done, Failed, Full, Job, Late, Listener, Piece, Stopping, TooLong
from isthmus.serving.pictures import Pictures
from isthmus.serving.pool import Pool, Row
from isthmus.serving.prefix import Prefixes
from isthmus.serving.prompts import Prefill, Prompt, prepare
from isthmus.serving.sampling import Settings
from isthmus.types import ConfigError, IsthmusError, Turn

Result = TypeVar("Result")
Task: TypeAlias = tuple[Future[Any], Callable[[], Any]]
IDLE = 0.5
"""Seconds after which a loop without work looks around."""
STOPPING = ("the server is stopping", "ask again in a moment")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """How much the engine takes on.

    Attributes:
        batch: answers that are decoded together.
        queue: requests that may wait; more are refused.
        context: tokens of a prompt and its answer; None is what the LLM was made for.
        chunk: tokens of prompts that are read between two decode steps, vectors of new pictures among them.
        prefix_bytes, picture_bytes: what is kept of earlier conversations and pictures.
    """

    batch: int = 16
    queue: int = 64
    context: int | None = None
    chunk: int = 512
    prefix_bytes: int = 512 << 20
    picture_bytes: int = 256 << 20


@dataclass
class Counts:
    """What happened so far, for metrics and tests."""

    steps: int = 0
    decoded_tokens: int = 0
    prompt_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclass(repr=False, eq=False)
class Engine:
    """Answers prompts with one model, which it alone may run from `start` to `close`.

    Raises:
        ConfigError: the model cannot be decoded in rows that come and go.
    """

    model: VLM
    sizes: Sizes = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        self.model.eval()
        self.pool = Pool(self.model, self.sizes.batch)
        own = self.model.config.text_config.max_position_embeddings
        self.context = min(own, self.sizes.context or own)
        self.counts = Counts()
        self.pictures = Pictures(self.model, self.sizes.picture_bytes)
        self.prefixes = Prefixes(self.sizes.prefix_bytes)
        self.renderer = self.model.processor.renderer()
        self.reader = self.model.processor.reader(self.renderer)
        ends = self.model.generation_config.eos_token_id
        self.ends = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
        self._inbox: queue.SimpleQueue[Job | Task | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._todo: deque[Task] = deque()
        self._reading: Prefill | None = None
        self._answers: list[Answer] = []  # one per row of the pool, in its order
        self._lock = threading.Lock()
        self._unread = self._tasks = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="isthmus-engine", daemon=True)

    # ------------------------------------------------------------------------------------ from other threads

    def start(self) -> Engine:
        self._thread.start()
        return self

    def close(self, grace: float = 0.0) -> None:
        """Finish what runs within `grace` seconds, fail the rest, and end the thread."""
        with self._lock:
            self._closing = True
        until = time.monotonic() + grace
        while self.busy and time.monotonic() < until and self._thread.is_alive():
            time.sleep(0.02)
        self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *unused: Any) -> None:
        self.close()

    @property
    def busy(self) -> int:
        """Requests that wait or run."""
        return self._unread + len(self._waiting) + (self._reading is not None) + len(self._answers)

    @property
    def waiting(self) -> int:
        """Requests that nothing was done for yet."""
        return self._unread + len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return len(self._answers)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def prepare(self, turns: Sequence[Turn], route: int | None = None) -> Prompt:
        """A conversation as tokens and pictures, in the caller's thread; without a `route` its parts tell it.

        Raises:
            ConfigError, DataError: the template, or a picture, refuses.
            TooLong: it leaves no room for an answer.
        """
        prompt = prepare(turns, self.renderer, self.reader, self.pictures, route)
        if len(prompt.ids) >= self.context:
            raise TooLong(
                f"the prompt has {len(prompt.ids)} tokens, of which {sum(prompt.places)} stand for pictures; "
                f"the context holds {self.context} with the answer",
                "shorten the conversation, or show fewer pictures",
            )
        return prompt

    def submit(self, prompt: Prompt, settings: Settings, listener: Listener) -> Job:
        """Ask for answers; `listener` is called from the engine's thread and must not block.

        Raises:
            ConfigError: more answers are asked for than are decoded together.
            Full: too many wait.
            Stopping: the engine is closing.
        """
        if settings.n > self.sizes.batch:
            raise ConfigError(f"{settings.n} answers at once", f"ask for at most {self.sizes.batch}")
        job = Job(prompt, settings, listener, self.model.processor.tokenizer)
        with self._lock:
            self._check_room(self.waiting)
            self._unread += 1
            self._inbox.put(job)
        return job

    def call(self, task: Callable[[], Result]) -> Future[Result]:
        """Run something that needs the model between two steps.

        Raises:
            Full: too much of this waits.
            Stopping: the engine is closing.
        """
        future: Future[Result] = Future()
        with self._lock:
            self._check_room(self._tasks)
            self._tasks += 1
            self._inbox.put((future, task))
        return future

    def _check_room(self, waiting: int) -> None:
        if self._closing:
            raise Stopping(*STOPPING)
        if waiting >= self.sizes.queue:
            raise Full("too many requests wait", "ask again in a moment")

    def answer(self, turns: Sequence[Turn], settings: Settings | None = None, route: int | None = None) -> list[str]:
        """The answers to a conversation, waited for.

        Raises:
            IsthmusError: it failed.
        """
        events: queue.SimpleQueue[Piece | Done | Failed] = queue.SimpleQueue()
        settings = settings or Settings()
        self.submit(self.prepare(turns, route), settings, events.put)
        texts, left = [""] * settings.n, settings.n
        while left:
            event = events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Piece):
                texts[event.index] += event.text
            else:
                left -= 1
        return texts

    # ------------------------------------------------------------------------------------ the loop

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            self._end()

    def _turn(self) -> bool:
        """One turn of the loop; whether another follows."""
        try:
            if not self._take():
                return False
            self._work()
            self._drop()
            self._read()
            self._step()
        except Exception:  # a turn that fails takes the rows that run, and nothing else
            log.exception("a turn of the engine failed")
            self._fail_running()
        return True

    def _end(self) -> None:
        """Fail whatever is left, and take nothing more: nobody would answer it."""
        with self._lock:
            self._closing = True
        while not self._inbox.empty():
            if (item := self._inbox.get()) is not None:
                self._accept(item)
        for future, _ in self._todo:
            if future.set_running_or_notify_cancel():
                future.set_exception(Stopping(*STOPPING))
        for job in [*self._waiting, *([self._reading.job] if self._reading else []), *(a.job for a in self._answers)]:
            job.fail(Stopping(*STOPPING))

    def _take(self) -> bool:
        """Take in what was asked; wait only where there is nothing else to do."""
        idle = not (self._answers or self._reading or self._waiting or self._todo)
        try:
            item = self._inbox.get(timeout=IDLE) if idle else self._inbox.get_nowait()
            while item is not None:
                self._accept(item)
                item = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _accept(self, item: Job | Task) -> None:
        """Put a request, or what is to be done between two steps, behind its kind."""
        if isinstance(item, Job):
            self._waiting.append(item)
            with self._lock:
                self._unread -= 1
        else:
            self._todo.append(item)

    def _work(self) -> None:
        """Do one task, so that no flood of them holds up the steps; it keeps its own failure."""
        if not self._todo:
            return
        future, task = self._todo.popleft()
        with self._lock:
            self._tasks -= 1
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(task())
        except BaseException as error:
            future.set_exception(error)

    def _drop(self) -> None:
        """Let go of what nobody waits for any more, or what took too long."""
        for slot in reversed(range(len(self._answers))):
            if self._gone(self._answers[slot].job):
                self._leave(slot)
        if self._reading is not None and self._gone(self._reading.job):
            self._reading = None
        self._waiting = deque(job for job in self._waiting if not self._gone(job))

    def _gone(self, job: Job) -> bool:
        if not job.over and job.late:
            self.counts.failed += 1
            job.fail(Late("the request took longer than it may", "ask for less, or when fewer ask"))
        elif job.cancelled and not job.over:
            self.counts.cancelled += 1
            job.over = True
        return job.over

    def _read(self) -> None:
        """Read prompts that there is room for, a chunk of tokens in all."""
        left = self.sizes.chunk
        while left > 0 and (reading := self._next()) is not None:
            try:
                left -= reading.advance(left)
                if reading.done:
                    self._reading = None
                    self._begin(reading)
            except Exception as error:
                self._reading = None
                self._failed(reading.job, error)

    def _next(self) -> Prefill | None:
        """The prompt that is being read, or the first that waits, if there is room for its answers."""
        if self._reading is None and self._waiting:
            if len(self._answers) + self._waiting[0].settings.n > self.sizes.batch:
                return None
            self._reading = Prefill(self._waiting.popleft(), self.model, self.pictures, self.prefixes)
        return self._reading

    def _begin(self, reading: Prefill) -> None:
        """The first token of each answer, and a row for those that go on."""
        job, row = reading.job, reading.row
        self.counts.prompt_tokens += len(job.prompt.ids)
        self.prefixes.keep(job.prompt.symbols, row)
        limit = min(job.settings.max_tokens, self.context - len(job.prompt.ids))
        logits_V = self.pool.head(reading.hidden_D).float().cpu()
        for number in range(job.settings.n):
            answer = Answer(job, number, limit, self.ends, reading.reused)
            if not self._advance(answer, logits_V):
                self._join(row)
                self._answers.append(answer)

    def _join(self, row: Row) -> None:
        """A row beside those that run; where that fails half-way, they too are at columns that nothing knows of."""
        try:
            self.pool.join(row)
        except Exception:
            self._fail_running()
            raise

    def _step(self) -> None:
        """One more token for every running answer."""
        if not self._answers:
            return
        logits_BV = self.pool.step([answer.last for answer in self._answers]).float().cpu()
        self.counts.steps += 1
        for slot in reversed(range(len(self._answers))):
            answer = self._answers[slot]
            try:
                ended = self._advance(answer, logits_BV[slot])
            except Exception as error:
                self._failed(answer.job, error)
                ended = True
            if ended:
                self._leave(slot, keep=answer.number == 0 and not answer.job.failed)

    def _advance(self, answer: Answer, logits_V: torch.Tensor) -> bool:
        """Choose a token and tell it; whether the answer has ended."""
        self.counts.decoded_tokens += 1
        ended = answer.advance(logits_V)
        if ended and answer.job.over:
            self.counts.finished += 1
        return ended

    def _leave(self, slot: int, keep: bool = False) -> None:
        """Free a slot; what was read and said may be the beginning of the next turn."""
        answer = self._answers[slot]
        if keep and self.sizes.prefix_bytes:
            symbols = answer.job.prompt.followed(answer.ids[:-1])
            self.prefixes.keep(symbols, self.pool.read(slot))
        self.pool.leave(slot)
        self._answers[slot] = self._answers[-1]
        self._answers.pop()

    def _failed(self, job: Job, error: Exception) -> None:
        log.error("a request failed: %s", type(error).__name__, exc_info=error)
        self.counts.failed += 1
        job.fail(error if isinstance(error, IsthmusError) else Broken("the model could not answer this", ""))

    def _fail_running(self) -> None:
        for answer in self._answers:
            self._failed(answer.job, Broken("the model could not answer this", ""))
        self._answers = []
        self.pool.clear()
