"""A tokenizer's chat template, taken apart once per pattern of roles, and text encoded without control tokens."""

from __future__ import annotations

import copy
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import FrameType
from typing import Any

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from isthmus.types import ConfigError, DataError, Role

FALLBACK = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content }}"
    "{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""For a tokenizer without a chat template: Vicuna's `USER: … ASSISTANT: …` with the end token after each answer."""

PATTERNS_KEPT = 256
STEPS, LONGEST = 1 << 18, 1 << 20
"""Lines that a template may run through and characters that it may write, once filled."""
REPAIR = "repair the tokenizer's chat template"
SHORT, REMEMBERED = 64, 1 << 14
"""Characters of a text whose ids are remembered, and how many such texts."""


@dataclass(frozen=True)
class Slot:
    """What stands around one turn's text: template text, then what the model itself says before and after it."""

    before: str
    lead: str
    end: str
    strip_left: bool
    strip_right: bool


@dataclass(frozen=True)
class Frame:
    """The template for one pattern of roles."""

    slots: tuple[Slot, ...]
    closing: str


class Template:
    """The chat template of a tokenizer as frames: fixed text around turns, found by rendering sentinels.

    `begin` and `end` are the tokens that the tokenizer itself puts around a text, as strings. Contents are strings, or
    lists of parts where the template knows nothing else (those that come with processors, as llava-hf's). `jinja` is
    the template itself, `FALLBACK` behind `begin` where the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        own = tokenizer("").input_ids
        begins = own[:1] == [tokenizer.bos_token_id]
        ends = own[int(begins) :] == [tokenizer.eos_token_id]
        self.begin: str = tokenizer.bos_token if begins else ""
        self.end: str = tokenizer.eos_token if ends else ""
        self._tokenizer = tokenizer
        self.jinja = tokenizer.chat_template or (self.begin + FALLBACK)
        self._frames: dict[tuple[Role, ...], Frame] = {}
        self._parts = not self._keeps(parts=False) and self._keeps(parts=True)
        self.codec = Codec(tokenizer, markers=self._fill(("user", "assistant", "user"), ("", "", "")))

    def frame(self, roles: tuple[Role, ...]) -> Frame:
        """The fixed text for a pattern of roles.

        Raises:
            ConfigError: the template refuses the pattern, or drops, changes, repeats or reorders turns.
            DataError: there is no turn.
        """
        if not roles:
            raise DataError("the conversation is empty", "give it at least one turn")
        if roles not in self._frames:
            if len(self._frames) >= PATTERNS_KEPT:
                self._frames.clear()
            self._frames[roles] = self._measure(roles)
        return self._frames[roles]

    def _measure(self, roles: tuple[Role, ...]) -> Frame:
        """Split the template at sentinels and find what of it is the model's own to say."""
        sentinels = _sentinels(roles)
        text = self._fill(roles, sentinels)
        pieces = _split(text, sentinels, roles)
        padded = _split(self._fill(roles, [f" {sentinel}\t" for sentinel in sentinels]), sentinels, roles)
        kept = [_kept_padding(piece, wide) for piece, wide in zip(pieces, padded)]
        # What ends an answer belongs to the answer; the rest of each piece belongs to the template.
        after = [
            self.codec.split_end(piece) if role == "assistant" else ("", piece)
            for role, piece in zip(roles, pieces[1:])
        ]
        befores = [pieces[0], *(rest for _, rest in after)]
        slots = []
        for index, role in enumerate(roles):
            before, start = befores[index], text.index(sentinels[index])
            cut = len(before) - (self._own(text[:start], roles[:index], before) if role == "assistant" else 0)
            slots.append(Slot(before[:cut], before[cut:], after[index][0], not kept[index][1], not kept[index + 1][0]))
        return Frame(tuple(slots), befores[-1])

    def _own(self, told: str, history: tuple[Role, ...], before: str) -> int:
        """How many characters before an answer come after the generation prompt: the model has to say them.

        None where they hold a control token (a header that the template writes only in training), or where the
        generation prompt is not how the conversation begins.
        """
        if not history:
            return 0
        prompt = self._fill(history, _sentinels(history), prompt=True)
        own = len(told) - len(prompt)
        if not told.startswith(prompt) or own > len(before) or self.codec.control.search(told[len(prompt) :]):
            return 0
        return own

    def _keeps(self, parts: bool) -> bool:
        """Whether a question's text survives as a string, or as a list of parts."""
        self._parts = parts
        (sentinel,) = _sentinels(("user",))
        try:
            return sentinel in self._fill(("user",), (sentinel,))
        except ConfigError:
            return False

    def _fill(self, roles: Sequence[Role], contents: Sequence[str], prompt: bool = False) -> str:
        messages: list[Any] = [
            {"role": role, "content": [{"type": "text", "text": content}] if self._parts else content}
            for role, content in zip(roles, contents)
        ]
        try:
            with _bounded(STEPS):
                text = self._tokenizer.apply_chat_template(
                    messages, chat_template=self.jinja, tokenize=False, add_generation_prompt=prompt
                )
        except (_Endless, RecursionError):
            raise ConfigError(f"the chat template takes more than {STEPS} steps", REPAIR) from None
        except TemplateError as error:
            cause = str(error).splitlines()[0]
            raise ConfigError(
                f"the chat template refuses the turns {', '.join(roles)}: {cause}",
                "put a system text into the first user turn, and let user and assistant alternate",
            ) from None
        if len(text) > LONGEST:
            raise ConfigError(f"the chat template writes more than {LONGEST} characters", REPAIR)
        return str(text)


class _Endless(Exception):
    """A template took too many steps; no template can catch it."""


@contextmanager
def _bounded(steps: int) -> Iterator[None]:
    """Count the lines that templates run through in this thread.

    Jinja makes Python of a template; its sandbox bounds what is reached and one `range`, but neither loops inside loops
    nor macros that call themselves. Steps are counted, not seconds: what is refused is refused on every machine.
    """
    left = steps

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":  # where Jinja's come from
            return None
        left -= 1
        if left < 0:
            raise _Endless
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _sentinels(roles: Sequence[Role]) -> list[str]:
    """Stand-ins for contents that no template changes or contains."""
    return [f"isthmus{index}sentinel" for index in range(len(roles))]


def _split(text: str, sentinels: Sequence[str], roles: Sequence[Role]) -> list[str]:
    """Cut the rendered template at its contents: one piece more than there are contents."""
    remedy = "repair the tokenizer's chat template, or turn the conversation into turns that it keeps"
    at = [text.find(sentinel) for sentinel in sentinels]
    for role, sentinel, start in zip(roles, sentinels, at):
        if start < 0:
            raise ConfigError(f"the chat template drops or changes the text of a {role} turn", remedy)
        if text.count(sentinel) > 1:
            raise ConfigError(f"the chat template repeats the text of a {role} turn", remedy)
    if at != sorted(at):
        raise ConfigError("the chat template reorders the turns", remedy)
    pieces = []
    for sentinel in sentinels:
        piece, _, text = text.partition(sentinel)
        pieces.append(piece)
    return [*pieces, text]


def _kept_padding(piece: str, padded: str) -> tuple[bool, bool]:
    """Whether the padding survived to the left of a piece (the end of a content) and to its right (a start)."""
    for tab, space in product(("\t", ""), (" ", "")):
        if tab + piece + space == padded:
            return bool(tab), bool(space)
    raise ConfigError("the chat template changes white space inside turns", REPAIR)


class Codec:
    """Encodes text in which nothing is a control token, and finds control tokens in what a template wrote."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, markers: str) -> None:
        named = set(tokenizer.all_special_tokens)
        self.tokens: dict[str, tuple[int, AddedToken]] = {
            token.content: (index, token)
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content in named or (token.content in markers and not token.content.isspace())
        }
        longest_first = sorted(self.tokens, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._forbidden = {index for index, _ in self.tokens.values()} - {tokenizer.unk_token_id}
        # A copy that sees no control token in any text. Its one new token is put before a run of text, so that the
        # run is encoded as what follows a control token, and not as the start of a text. Random: nobody can type it.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.add_special_tokens([token for _, token in self.tokens.values()])
        self._backend.encode_special_tokens = True
        self._anchor = f"<{secrets.token_hex(16)}>"
        self._backend.add_tokens([AddedToken(self._anchor, normalized=False, special=False)])
        self._met: dict[tuple[str, bool], list[int]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # copies of a tokenizer forget it

    def plain(self, text: str, follows: bool) -> list[int]:
        """Ids of a text that `follows` a control token or starts the sequence; none of them is a control token.

        Short texts that come again, which what a template writes always does, are looked up.
        """
        if len(text) > SHORT:
            return self._encode(text, follows)
        ids = self._met.get((text, follows))
        if ids is None:
            if len(self._met) >= REMEMBERED:
                self._met.clear()
            ids = self._met[text, follows] = self._encode(text, follows)
        return ids.copy()

    def _encode(self, text: str, follows: bool) -> list[int]:
        if not text:
            return []
        whole = self._anchor + text if follows else text
        # A batch of one: `encode` itself lets no other thread run, and a server has others while a text is long.
        encoded = self._backend.encode_batch([whole], add_special_tokens=False)[0].ids
        ids = encoded[1:] if follows else encoded
        typed = self.control.search(text)
        if typed and len(typed.group()) > 1 and not self._forbidden.isdisjoint(ids):
            # The vocabulary itself holds the control token as a word (Unigram models do): break the word.
            middle = typed.start() + 1
            return self.plain(text[:middle], follows) + self.plain(text[middle:], True)
        return ids

    def split_end(self, piece: str) -> tuple[str, str]:
        """What follows an answer, cut after its first control token; nothing ends the answer if there is none."""
        token = self.control.search(piece)
        return ("", piece) if token is None else (piece[: token.end()], piece[token.end() :])

    def pieces(self, text: str) -> Iterator[str | tuple[int, AddedToken]]:
        """Template text as plain text and control tokens in turn."""
        at = 0
        for token in self.control.finditer(text):
            yield text[at : token.start()]
            yield self.tokens[token.group()]
            at = token.end()
        yield text[at:]
