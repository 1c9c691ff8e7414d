"""What a record says, turn by turn: LLaVA's `conversations`, and OpenAI's `messages` with their parts of content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from isthmus.data import slips
from isthmus.data.attached import IMAGE, VIDEO, Attached, InMemory
from isthmus.data.faults import Wrong
from isthmus.data.layout import listed
from isthmus.types import Box, DataError, Grounding, Image, Part, Role, Text, Turn

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
KINDS = {"image": IMAGE, "video": VIDEO}
"""The marker that a part of content stands for where it brings no medium of its own."""


def turns(messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
    """OpenAI-style messages in memory as turns; an image part may hold any `Source`, and the last turn may be open.

    Raises:
        DataError: an unknown role or part, or turns that do not alternate.
    """
    try:
        made = tuple(message(one, InMemory()) for one in listed(messages, "messages"))
        check_order(made)
    except Wrong as wrong:
        raise DataError(wrong.message, wrong.remedy) from None
    return made


def spoken(item: Any, attached: Attached) -> Turn:
    """One turn of LLaVA's `conversations`."""
    if not isinstance(item, dict):
        raise Wrong("a turn is not an object", 'write {"from": "human" | "gpt", "value": "…"}')
    return _weighted(Turn(_role(item.get("from")), tuple(attached.text(text(item.get("value"))))), item)


def message(item: Any, attached: Attached | InMemory) -> Turn:
    """One of `messages`."""
    if not isinstance(item, Mapping):
        raise Wrong("a message is not an object", 'write {"role": "user" | "assistant", "content": …}')
    role, content = _role(item.get("role")), item.get("content")
    if isinstance(content, str):
        parts = tuple(attached.text(text(content)))
    else:
        parts = tuple(part for one in listed(content, "content") for part in _parts(one, attached))
    return _weighted(Turn(role, parts), item)


def _weighted(turn: Turn, item: Mapping[str, Any]) -> Turn:
    """The turn; nothing is learnt of it by OpenAI's `weight` 0, ms-swift's `loss` or axolotl's `train` false."""
    slips.refuse(item, slips.TURN)
    weights = {key: item[key] for key in ("weight", "loss", "train") if item.get(key) is not None}
    if any(weight not in (0, 1) for weight in weights.values()):
        raise Wrong("the weight of an answer is neither 0 nor 1", "write weight 0 or 1, or loss or train true or false")
    if turn.role != "assistant" or 0 not in weights.values():
        return turn
    if 1 in weights.values():
        raise Wrong(f"{' and '.join(weights)} of an answer say two things", "keep one of them")
    if any(isinstance(part, Box | Grounding) for part in turn.parts):
        raise Wrong("an answer that is not to be learnt holds a region", "let it be learnt, or leave the region out")
    return replace(turn, parts=tuple(replace(p, given=True) if isinstance(p, Text) else p for p in turn.parts))


def _parts(item: Any, attached: Attached | InMemory) -> Sequence[Part]:
    """One item of a message's content."""
    if not isinstance(item, Mapping):
        raise Wrong("a part of content is not an object", 'write {"type": "text", "text": "…"}')
    kind = item.get("type")
    if kind in ("text", "input_text", "output_text"):  # the latter two in the Responses API
        return attached.text(text(item.get("text")))
    if kind in ("image_url", "input_image"):
        url = item.get("image_url")
        return [Image(attached.picture(url.get("url") if isinstance(url, Mapping) else url))]
    if isinstance(kind, str) and kind in KINDS:
        named = {key: item[key] for key in (kind, "url", "path") if item.get(key) is not None}
        if not named:
            return [attached.next(KINDS[kind], item.get("index"))]
        given, *others = named.values()
        if any(other != given for other in others):
            raise Wrong(f"a part names its {kind} as {' and as '.join(named)}, which differ", "keep one of them")
        return [Image(attached.picture(given)) if kind == "image" else attached.video(given)]
    if kind == "box":
        return [attached.region(item)]
    if kind == "grounding":
        return [Grounding()]
    raise Wrong(f"unknown part {str(kind)[:40]!r}", "parts are text, image, image_url, video, box and grounding")


def text(given: Any) -> str:
    """The value, checked to be a string without lone surrogates.

    Raises:
        Wrong: it is something else.
    """
    if not isinstance(given, str):
        raise Wrong("a turn's text is not a text", "write a string")
    if not given.isprintable() and any("\ud800" <= char <= "\udfff" for char in given):
        raise Wrong("a text or id holds half a surrogate pair, which is no character", "write the whole character")
    return given


def _role(given: Any) -> Role:
    if not isinstance(given, str) or given not in ROLES:
        raise Wrong(f"unknown role {str(given)[:40]!r}", f"roles are {', '.join(ROLES)}")
    return ROLES[given]


def check_order(conversation: tuple[Turn, ...]) -> None:
    """Raises `Wrong` where user and assistant do not alternate, the user first, a system turn before them."""
    body = conversation[1:] if conversation and conversation[0].role == "system" else conversation
    for index, turn in enumerate(body):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            remedy = "start with the user, let user and assistant alternate, and put system first or nowhere"
            raise Wrong(f"turns do not alternate: turn {index + 1} is {turn.role}, not {expected}", remedy)


def check_answers(conversation: tuple[Turn, ...]) -> None:
    """Raises `Wrong` where there is no answer to learn, or an empty one."""
    answers = [turn for turn in conversation if turn.role == "assistant"]
    if not answers:
        raise Wrong("there is no assistant turn", "add the answer to be learnt, or remove the record")
    if any(not _says(turn) for turn in answers):
        raise Wrong("an answer is empty", "write the answer, or remove its question and it")
    if not any(map(learnt, answers)):
        raise Wrong("no answer is learnt", "give one of them the weight 1, or remove the record")


def learnt(answer: Turn) -> bool:
    """Whether something of an answer is learnt: all but one whose every word is given."""
    words = [part for part in answer.parts if isinstance(part, Text)]
    return not words or not all(part.given for part in words)


def _says(turn: Turn) -> bool:
    return bool(turn.text.strip()) or any(not isinstance(part, Text) for part in turn.parts)
