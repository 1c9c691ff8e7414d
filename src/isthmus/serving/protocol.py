"""Requests of OpenAI's protocol: what of them is read, and how they become turns and settings.

Unknown fields are ignored, as clients send many. Strings never become tokens with a meaning: a typed `<image>` or
control token stays text, and no caller brings a template, token ids, tensors or hashes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isthmus.serving import tools as toolbox
from isthmus.serving.grammar import ANY_JSON, Grammars
from isthmus.serving.limits import Limits
from isthmus.serving.refusals import Refusal, invalid
from isthmus.serving.sampling import Settings
from isthmus.types import DataError, Image, Part, Role, Route, Text, Turn

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
}
See: TypeAlias = Callable[[str], Image]
"""A picture from its URL."""
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class _Asked(BaseModel):
    """Fields are taken as they are written, not made to fit."""

    model_config = ConfigDict(extra="ignore", strict=True, arbitrary_types_allowed=False)


class ImageURL(_Asked):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ContentPart(_Asked):
    type: str
    text: str | None = None
    image_url: ImageURL | str | None = None


class CalledFunction(_Asked):
    name: Name
    arguments: str


class Call(_Asked):
    function: CalledFunction


class Message(_Asked):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[Call] | None = None


class Function(_Asked):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Asked):
    type: Literal["function"]
    function: Function


class NamedFunction(_Asked):
    name: Name


class NamedTool(_Asked):
    type: Literal["function"]
    function: NamedFunction


class JSONSchema(_Asked):
    schema_: dict[str, Any] = Field(default_factory=lambda: dict(ANY_JSON), alias="schema")


class ResponseFormat(_Asked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StreamOptions(_Asked):
    include_usage: bool | None = None


class ChatRequest(_Asked):
    """The body of `/v1/chat/completions`."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    route: Literal["image", "region", 0, 1] | None = Field(
        None,
        description="Asked about the picture as a whole (image, 0) or about places in it (region, 1), where the model "
        "treats these apart. Not OpenAI's.",
    )

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that may be called in the answer."""
        if self.tool_choice == "none":
            return []
        chosen = [tool.function.model_dump(exclude_none=True) for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool):
            chosen = [tool for tool in chosen if tool["name"] == self.tool_choice.function.name]
        return chosen

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


class EmbeddingRequest(_Asked):
    """The body of `/v1/embeddings`; an image part may stand where OpenAI has text alone."""

    model: str
    input: str | list[str | ContentPart]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


Body = TypeVar("Body", bound=_Asked)


def read(kind: type[Body], raw: bytes) -> Body:
    """A body, checked.

    Raises:
        Refusal: it is no JSON (NaN, lone surrogates and deep nesting included), or a field is wrong.
    """
    try:
        tree = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError:
        raise invalid("the body is not valid JSON, or nested too deeply") from None
    if not isinstance(tree, dict):
        raise invalid("the body is not a JSON object")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"])[:80]
        raise invalid(f"{place}: {first['msg'][:200]}", place) from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


# ---------------------------------------------------------------------------------------------- messages to turns


@dataclass(frozen=True)
class _Read:
    """One message as a turn, and how large it is."""

    role: Role
    parts: tuple[Part, ...]


def turns(request: ChatRequest, limits: Limits, see: See) -> tuple[Turn, ...]:
    """The conversation. What follows each other in one role is one turn; tools stand in the system turn.

    Raises:
        Refusal: it is too large, a part is of no known type, or the answer would follow an answer.
    """
    _check_amount(request, limits)
    read = [_Read(ROLES[message.role], tuple(_parts(message, see))) for message in request.messages]
    if request.offered:
        read.insert(0, _Read("system", (Text(toolbox.introduced(request.offered)),)))
    joined: list[Turn] = []
    for one in read:
        if joined and joined[-1].role == one.role:
            joined[-1] = Turn(one.role, (*joined[-1].parts, Text("\n\n"), *one.parts))
        else:
            joined.append(Turn(one.role, one.parts))
    if joined[-1].role != "user":
        raise invalid("the last message is not the user's or a tool's", "messages")
    if any(turn.role == "system" for turn in joined[1:]):
        raise invalid("a system message stands behind the beginning", "messages")
    return tuple(joined)


def _check_amount(request: ChatRequest, limits: Limits) -> None:
    """Count everything before anything is decoded."""
    if len(request.messages) > limits.messages:
        raise invalid(f"more than {limits.messages} messages", "messages")
    listed = [message.content for message in request.messages if isinstance(message.content, list)]
    if any(len(content) > limits.parts for content in listed):
        raise invalid(f"a message has more than {limits.parts} parts", "messages")
    pictures = sum(part.type == "image_url" for content in listed for part in content)
    if pictures > limits.pictures:
        raise invalid(f"{pictures} pictures; at most {limits.pictures} are read", "messages", "too_many_images")
    if any(len(message.tool_calls or ()) > limits.parts for message in request.messages):
        raise invalid(f"a message has more than {limits.parts} tool calls", "messages")
    if len(request.tools or ()) > limits.tools:
        raise invalid(f"more than {limits.tools} tools", "tools")
    told = len(toolbox.introduced(request.offered)) if request.offered else 0
    if told + sum(len(text) for message in request.messages for text in _texts(message)) > limits.text:
        raise invalid(f"more than {limits.text} characters of text", "messages", "string_above_max_length")


def _texts(message: Message) -> Iterator[str]:
    if isinstance(message.content, str):
        yield message.content
    elif message.content:
        yield from (part.text for part in message.content if part.text is not None)
    yield from (call.function.arguments for call in message.tool_calls or ())


def _parts(message: Message, see: See) -> Iterator[Part]:
    content = message.content
    if content is not None:
        parts = [Text(content)] if isinstance(content, str) else [_part(part, message.role, see) for part in content]
        yield from toolbox.answered(parts) if message.role == "tool" else parts
    if message.tool_calls:
        yield Text(("\n" if content else "") + toolbox.said([call.model_dump() for call in message.tool_calls]))
    if content is None and not message.tool_calls:
        raise invalid("a message says nothing", "messages")


def _part(part: ContentPart, role: str, see: See) -> Part:
    if part.type == "text" and part.text is not None:
        return Text(part.text)
    if part.type == "image_url" and part.image_url is not None:
        if role not in ("user", "tool"):
            raise invalid("pictures stand in user and tool messages only", "messages")
        return see(part.image_url if isinstance(part.image_url, str) else part.image_url.url)
    raise invalid("a part is neither text nor image_url", "messages", "unsupported_content")


def route(request: ChatRequest, apart: bool) -> Route | None:
    """Of which kind the task is, where the request says it; `apart`: whether the model treats kinds apart.

    Raises:
        Refusal: it does not.
    """
    if request.route is None:
        return None
    if not apart:
        raise invalid("this model does not treat kinds of tasks apart: it takes no route", "route")
    return Route[request.route.upper()] if isinstance(request.route, str) else Route(request.route)


# ---------------------------------------------------------------------------------------------- settings


def settings(request: ChatRequest, limits: Limits, grammars: Grammars, batch: int) -> Settings:
    """What the engine is asked for; `batch` answers fit into it at once.

    Raises:
        Refusal: more is asked for than one request may have, or a schema cannot be kept to.
    """
    n, stops = request.n or 1, [request.stop] if isinstance(request.stop, str) else request.stop or []
    if n > min(limits.answers, batch):
        raise invalid(f"n is {n}; at most {min(limits.answers, batch)} answers are given", "n")
    if len(stops) > limits.stops or any(not 0 < len(stop) <= limits.stop_length for stop in stops):
        raise invalid(f"at most {limits.stops} stop strings of 1 to {limits.stop_length} characters", "stop")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs", "top_logprobs")
    schema, said_in = _schema(request), "tools" if request.must_call else "response_format"
    if schema is not None and len(json.dumps(schema)) > limits.schema:
        raise invalid(f"the JSON schema has more than {limits.schema} characters", said_in)
    try:
        grammar = None if schema is None else grammars.schema(schema)
    except DataError as error:
        raise invalid(error.cause, said_in) from None
    wished = [wish for wish in (request.max_tokens, request.max_completion_tokens) if wish is not None]
    return Settings(
        max_tokens=min([*wished, limits.tokens]),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        stop=tuple(stops),
        n=n,
        seed=request.seed,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=grammar,
        deadline=limits.deadline,
    )


def _schema(request: ChatRequest) -> dict[str, Any] | None:
    """What the answer must look like, if it must."""
    if request.must_call:
        if not request.offered:
            raise invalid("tool_choice names no tool of the request", "tool_choice")
        return toolbox.schema(request.offered)
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_JSON
    if wanted.json_schema is None:
        raise invalid("json_schema is missing", "response_format")
    return wanted.json_schema.schema_


def embedded(request: EmbeddingRequest, limits: Limits, see: See) -> Sequence[str | Image]:
    """The texts and pictures of a request for embeddings.

    Raises:
        Refusal: there are none, too many or empty ones, or other dimensions are asked for.
    """
    inputs = [request.input] if isinstance(request.input, str) else request.input
    if request.dimensions is not None:
        raise invalid("embeddings have one size", "dimensions")
    if not 0 < len(inputs) <= limits.inputs:
        raise invalid(f"1 to {limits.inputs} inputs", "input")
    if sum(not isinstance(item, str) and item.type == "image_url" for item in inputs) > limits.pictures:
        raise invalid(f"at most {limits.pictures} pictures", "input", "too_many_images")
    if sum(len(item if isinstance(item, str) else item.text or "") for item in inputs) > limits.text:
        raise invalid(f"more than {limits.text} characters of text", "input", "string_above_max_length")
    found: list[str | Image] = []
    for item in inputs:
        part = Text(item) if isinstance(item, str) else _part(item, "user", see)
        if isinstance(part, Text) and not part.text:
            raise invalid("an input is empty", "input")
        assert isinstance(part, Text | Image)
        found.append(part.text if isinstance(part, Text) else part)
    return found


__all__ = ["ChatRequest", "EmbeddingRequest", "Refusal", "embedded", "read", "route", "settings", "turns"]
