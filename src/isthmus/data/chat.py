"""Conversations become token ids, and every token knows whether it is trained and what stands there.

Labels come from spans, never from re-tokenising. The tokenizer's chat template is rendered once per pattern of
roles with sentinels as contents and split there. Control tokens that the template wrote are inserted by id, and
everything between two of them is encoded in one go as plain text, so that `<|im_end|>` or `<image>` typed by a
user stays text, while ids equal those of `apply_chat_template` for ordinary contents.

Differs from `apply_chat_template`: an answer starts on a token of its own, exactly where the generation prompt
ends, so that a prompt is always a prefix of what was trained; and a template that never ends an answer gets the
tokenizer's end token after it, since a model could not learn to stop otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby
from typing import TypeAlias

from rich.text import Text as RichText
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from isthmus.config import Writing
from isthmus.data.boxes import UNMAPPED, Regions
from isthmus.data.hints import Hints, Markup
from isthmus.data.messages import learnt
from isthmus.data.template import Codec, Template
from isthmus.types import KIND, ConfigError, DataError, Layout, Medium, Modality, Part, Tag, Text, Turn

Layouts: TypeAlias = Mapping[str, Layout | Callable[[Medium], Layout]]

STYLES = {"learnt": "bold green", "medium": "cyan", "read": "dim"}
"""How tokens are shown in the terminal: those that carry loss, places of media, and the rest."""


@dataclass
class Rendered:
    """One conversation as tokens. `trained` covers `decoder_ids` where there are any, else `ids`."""

    ids: list[int]
    trained: list[bool]
    modality: list[int]
    media: tuple[Medium, ...]
    spans: list[tuple[int, int]]
    """Where the placeholders of each medium stand in `ids`: (start, end)."""
    decoder_ids: list[int] | None = None
    branch: list[int] | None = None
    """Of each of `ids`: 0 in the beginning that several conversations share, then the number of its conversation."""


def share(conversations: Sequence[Rendered], open_answer: bool = False) -> Rendered:
    """Several conversations with a common beginning as one, the beginning once and then each one's rest.

    The last token before an answer always stays with the answer, because it is what predicts it; the last answer is
    always a conversation's own, and no other is cut in two. What follows the last answer is left out, since nothing
    reads it; with `open_answer` it is the question.

    Raises:
        DataError: they are an encoder-decoder's, or a medium stands behind the common beginning.
    """
    first = conversations[0]
    if any(one.decoder_ids is not None for one in conversations):
        raise DataError("an encoder-decoder cannot read branches", "give each question a sample of its own")
    shared = min(_agreement(first.ids, one.ids) for one in conversations)
    while (border := min(_border(one.trained, shared) for one in conversations)) < shared:
        shared = border
    if any(one.media != first.media or any(end > shared for _, end in one.spans) for one in conversations):
        raise DataError("branches differ before or in their media", "put the same media first in every branch")
    ids, trained, modality = first.ids[:shared], first.trained[:shared], first.modality[:shared]
    branch = [0] * shared
    for number, one in enumerate(conversations, start=1):
        own = slice(shared, None if open_answer else _last(one.trained, len(one.ids) - 1) + 1)
        ids += one.ids[own]
        trained += one.trained[own]
        modality += one.modality[own]
        branch += [number] * len(one.ids[own])
    return Rendered(ids, trained, modality, first.media, first.spans, branch=branch)


def _agreement(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids from the start are the same."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _border(trained: Sequence[bool], place: int) -> int:
    """The last place up to this one that is before the last answer, and before the start of any answer it is in."""
    place = min(place, _last(trained, place))
    while place and place < len(trained) and trained[place]:
        place -= 1
    return place


def _last(trained: Sequence[bool], default: int) -> int:
    """The place of the last token that is learnt."""
    return max((place for place, learnt in enumerate(trained) if learnt), default=default)


def cut(text: str) -> tuple[str, str]:
    """First words and rest, which begins with white space, between any two words; nothing and all of a single word.

    Where, the text alone decides, so that its length is known ahead and every run and process cuts it alike.
    """
    gaps = [found.start() for found in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    if not gaps:
        return "", text
    at = gaps[int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) % len(gaps)]
    return text[:at], text[at:]


class Renderer:
    """Renders turns for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        layouts: how a medium of each kind appears; a function of the medium where pictures differ in length.
        placeholders: the token id that stands for one vector of each kind.
        template: how conversations are written; where the tokenizer has no chat template, by `FALLBACK`.
        system: the system turn of conversations that have none; None leaves it to the template.
        decoder_start: the id an encoder-decoder's decoder starts with; None for a decoder alone.
        regions: how regions of pictures are written.
        hints: how a tagger's tags are written.

    Raises:
        ConfigError: the tokenizer is not a fast one, lacks an end token, or its template loses contents.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        layouts: Layouts,
        placeholders: Mapping[str, int],
        template: Writing = "chat",
        system: str | None = None,
        decoder_start: int | None = None,
        regions: Regions = UNMAPPED,
        hints: Hints = Hints(),  # noqa: B008 - frozen
    ) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer", "use a model whose folder holds tokenizer.json"
            )
        if tokenizer.eos_token is None:
            raise ConfigError("the tokenizer has no end-of-sequence token", "set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.layouts = layouts
        self.placeholders = placeholders
        self.template = template
        self.system = system
        self.decoder_start = decoder_start
        self.regions, self.hints = regions, hints
        self._chat = Template(tokenizer)
        self._write = self._write_chat if template == "chat" else self._write_document

    def plain(self, text: str) -> list[int]:
        """Ids of a text that stands alone; none of them is a control token."""
        return self._chat.codec.plain(text, follows=False)

    def render(self, turns: Sequence[Turn], open_answer: bool = False) -> Rendered:
        """Tokens of a conversation; `open_answer` ends with the generation prompt instead of an answer.

        Raises:
            ConfigError: the template refuses or loses a turn, or no layout exists for a medium.
            DataError: `plain` or `prefix` finds no answer, or an open answer would follow an answer.
        """
        if open_answer and turns and turns[-1].role == "assistant":
            raise DataError("an answer cannot be opened after an answer", "leave the last assistant turn out")
        turns = self.regions.spell(turns)
        captions = self.template in ("plain", "prefix")
        if captions:
            turns = self._caption(turns, open_answer)
        if self.decoder_start is not None:
            return self._render_pair(turns, open_answer, self.decoder_start)
        if self.system is not None and turns and turns[0].role != "system" and not captions:
            turns = (Turn.say("system", self.system), *turns)
        stream = _Stream(self._chat.codec)
        self._write(stream, turns, open_answer)
        return stream.rendered()

    def render_string(self, pieces: Sequence[str | Medium]) -> Rendered:
        """Tokens of a string that was templated elsewhere, in which control tokens count, with media between."""
        stream, ended = _Stream(self._chat.codec), ""
        for piece in pieces:
            if isinstance(piece, str):
                stream.template(piece.removeprefix(ended))
            ended = "" if isinstance(piece, str) else self._write_medium(stream, piece)
        return stream.rendered()

    def preview(self, rendered: Rendered) -> RichText:
        """The tokens in colour: trained ones green, media as `[image × 49]`, the rest dim."""
        text = RichText()
        trained = rendered.trained if rendered.decoder_ids is None else [False] * len(rendered.ids)
        self._colour(text, rendered.ids, trained, rendered.modality)
        if rendered.decoder_ids is not None:
            text.append(" → ")
            self._colour(text, rendered.decoder_ids, rendered.trained, [Modality.TEXT] * len(rendered.trained))
        return text

    # ------------------------------------------------------------------------------------- the ways to write

    def _write_chat(self, stream: _Stream, turns: Sequence[Turn], open_answer: bool) -> None:
        roles = tuple(turn.role for turn in turns)
        frame = self._chat.frame((*roles, "assistant") if open_answer else roles)
        for turn, slot in zip(turns, frame.slots):
            answer = turn.role == "assistant"
            learns = learnt(turn)
            stream.template(slot.before)
            stream.template(slot.lead, trained=learns)
            self._write_contents(stream, turn, answer, slot.strip_left, slot.strip_right)
            if answer:
                stream.template(slot.end or self.tokenizer.eos_token, trained=learns)
        stream.template(frame.slots[-1].before if open_answer else frame.closing)

    def _caption(self, turns: Sequence[Turn], open_answer: bool) -> tuple[Turn, ...]:
        """LLaVA's first stage: the media of the first user turn, then the first answer; the question is left out.

        With `prefix`, the answer's first words stand beside the media.
        """
        shown = next((turn.media for turn in turns if turn.role == "user"), ())
        if open_answer:
            return (Turn("user", shown),)
        answer = next((turn for turn in turns if turn.role == "assistant"), None)
        if answer is None:
            raise DataError("the conversation has no assistant turn", "add the text that the picture is to evoke")
        if self.template == "plain":
            return Turn("user", shown), answer
        if any(not isinstance(part, Text) or part.given for part in answer.parts):
            raise DataError("an answer of more than words to be learnt has no first words", "use template: plain")
        first, rest = cut(answer.text)
        if self.decoder_start is not None:
            rest = rest.lstrip()  # it begins a text of its own
        return Turn("user", (*shown, *([Text(first)] if first else []))), Turn.say("assistant", rest)

    def _write_document(self, stream: _Stream, turns: Sequence[Turn], open_answer: bool) -> None:
        """All turns in their order with nothing between; what the assistant says is learnt, and at last the end."""
        stream.template(self._chat.begin)
        for turn in turns:
            self._write_contents(stream, turn, trained=turn.role == "assistant")
        if not open_answer:
            stream.template(self.tokenizer.eos_token, trained=True)

    def _render_pair(self, turns: Sequence[Turn], open_answer: bool, decoder_start: int) -> Rendered:
        """The prompt for the encoder, the last answer for the decoder. Without a template, one turn per line."""
        if not open_answer and (not turns or turns[-1].role != "assistant"):
            raise DataError("the conversation does not end with an answer", "end it with an assistant turn")
        question = turns if open_answer else turns[:-1]
        prompt, answer = _Stream(self._chat.codec), _Stream(self._chat.codec)
        if self.template != "chat" or self.tokenizer.chat_template:
            self._write(prompt, question, True)
        else:
            for number, turn in enumerate(question):
                prompt.text("\n" if number else "")
                self._write_contents(prompt, turn, trained=False)
        prompt.template(self._chat.end)
        rendered = prompt.rendered()
        if not open_answer:
            self._write_contents(answer, turns[-1], trained=True)
            answer.template(self.tokenizer.eos_token, trained=True)
        told = answer.rendered()
        if told.media:
            raise DataError("an encoder-decoder cannot read a picture inside an answer", "move it into the question")
        rendered.trained = [False, *told.trained]
        rendered.decoder_ids = [decoder_start, *told.ids]
        return rendered

    def _write_contents(
        self, stream: _Stream, turn: Turn, trained: bool, strip_left: bool = False, strip_right: bool = False
    ) -> None:
        contents = self._contents(turn)
        if contents and strip_left and isinstance(first := contents[0], Text):
            contents[0] = replace(first, text=first.text.lstrip())
        if contents and strip_right and isinstance(last := contents[-1], Text):
            contents[-1] = replace(last, text=last.text.rstrip())
        ended = ""
        for content in contents:
            if isinstance(content, Text):
                stream.text(content.text.removeprefix(ended), trained and not content.given)
            elif isinstance(content, Markup):
                stream.template(content.text)
            ended = self._write_medium(stream, content) if isinstance(content, Medium) else ""

    def _contents(self, turn: Turn) -> list[Text | Markup | Medium]:
        """The turn's parts with neighbouring texts joined, and tags in the joint's own words."""
        contents: list[Text | Markup | Medium] = []
        for part in self._written(turn.parts):
            before = contents[-1] if contents else None
            if isinstance(part, Text) and isinstance(before, Text) and before.given == part.given:
                contents[-1] = replace(before, text=before.text + part.text)
            else:
                contents.append(part)
        return contents

    def _written(self, parts: Sequence[Part]) -> Iterator[Text | Markup | Medium]:
        """Parts one by one, tags that follow each other as one hint; regions are text by now."""
        for are_tags, group in groupby(parts, key=lambda part: isinstance(part, Tag)):
            members = list(group)
            if are_tags:
                hint = self.hints.write([tag for tag in members if isinstance(tag, Tag)])
                yield from (piece if isinstance(piece, Markup) else Text(piece) for piece in hint)
            else:
                yield from (part for part in members if isinstance(part, Text | Medium))

    def _write_medium(self, stream: _Stream, medium: Medium) -> str:
        """Write a medium; says what ended its line, which a text behind it may bring along, as LLaVA's data does."""
        kind = KIND[type(medium)]
        if kind not in self.layouts:
            shown = "; frames of a video are pictures (options: {frames: 8})" if kind == "video" else ""
            raise ConfigError(
                f"this model has no encoder for {kind}", f"it reads {sorted(self.layouts) or 'text'} only{shown}"
            )
        layout = self.layouts[kind]
        if not isinstance(layout, Layout):
            layout = layout(medium)
        stream.template(layout.before)
        stream.medium(medium, self.placeholders[kind], layout.count, Modality[kind.upper()])
        stream.template(layout.after)
        return "\n" if layout.after.endswith("\n") else ""

    def _colour(self, text: RichText, ids: list[int], trained: list[bool], modality: list[int]) -> None:
        for (kind, learn), group in groupby(zip(ids, trained, modality), key=lambda token: (token[2], token[1])):
            tokens = [token[0] for token in group]
            if kind != Modality.TEXT:
                text.append(f"[{Modality(kind).name.lower()} × {len(tokens)}]", style=STYLES["medium"])
            else:
                text.append(str(self.tokenizer.decode(tokens)), style=STYLES["learnt" if learn else "read"])


class _Stream:
    """Collects a conversation. Text between two control tokens is one run, encoded at once when it is complete."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._out = Rendered([], [], [], (), [])
        self._given = self._answered = ""
        self._strip_next = False

    def text(self, text: str, trained: bool = False) -> None:
        """Plain text; the trained part of a run starts on a token of its own."""
        if self._strip_next:
            text = text.lstrip()
            self._strip_next = not text
        if trained:
            self._answered += text
        elif text:
            if self._answered:
                self._flush()
            self._given += text

    def template(self, text: str, trained: bool = False) -> None:
        """Text in which control tokens count."""
        for piece in self._codec.pieces(text):
            if isinstance(piece, str):
                self.text(piece, trained)
            else:
                index, token = piece
                if token.lstrip:  # such a token swallows the white space beside it
                    self._answered = self._answered.rstrip()
                    self._given = self._given if self._answered else self._given.rstrip()
                self._flush()
                self._append([index], trained)
                self._strip_next = token.rstrip

    def medium(self, medium: Medium, placeholder: int, count: int, modality: Modality) -> None:
        self._flush()
        self._strip_next = False
        start = len(self._out.ids)
        self._append([placeholder] * count, False, modality)
        self._out.spans.append((start, start + count))
        self._out.media += (medium,)

    def rendered(self) -> Rendered:
        self._flush()
        return self._out

    def _flush(self) -> None:
        follows = bool(self._out.ids)
        prompt = self._codec.plain(self._given, follows)
        if self._answered:
            whole = self._codec.plain(self._given + self._answered, follows)
            if whole[: len(prompt)] != prompt:  # a token would straddle the prompt's end
                whole = prompt + self._codec.plain(self._answered, True)
            self._append(prompt, False)
            self._append(whole[len(prompt) :], True)
        else:
            self._append(prompt, False)
        self._given = self._answered = ""

    def _append(self, ids: list[int], trained: bool, modality: Modality = Modality.TEXT) -> None:
        self._out.ids += ids
        self._out.trained += [trained] * len(ids)
        self._out.modality += [int(modality)] * len(ids)
