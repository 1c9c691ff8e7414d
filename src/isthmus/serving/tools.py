"""Tools, in the convention that most open models with tools were trained on: JSON between `<tool_call>` tags.

Templates differ in how they write tools, and ours renders turns alone. So the tools stand in the system turn as text,
calls of earlier turns are written back as they were said, and results come as the user's `<tool_response>`. Nothing
that a model says is executed here; a call is JSON for the client.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from isthmus.types import Part, Text

OPENING, CLOSING = re.compile(r"<tool_call>\s*"), re.compile(r"\s*</tool_call>")
DECODER = json.JSONDecoder()
INTRODUCTION = (
    "You may call one of these tools. To call it, answer with nothing but\n"
    '<tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>\n'
    "The tools, one per line:\n"
)


def introduced(tools: Sequence[dict[str, Any]]) -> str:
    """What the system turn says of the tools."""
    return INTRODUCTION + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)


def said(calls: Sequence[dict[str, Any]]) -> str:
    """Calls of an earlier answer, as the model said them."""
    lines = []
    for call in calls:
        call = call["function"]
        lines.append(f'<tool_call>{{"name": {json.dumps(call["name"])}, "arguments": {call["arguments"]}}}</tool_call>')
    return "\n".join(lines)


def answered(result: Sequence[Part]) -> list[Part]:
    """A tool's result as the user tells it."""
    return [Text("<tool_response>"), *result, Text("</tool_response>")]


def schema(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools, for answers that must be one."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["name"]}, "arguments": {"$ref": f"#/$defs/{place}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, tool in enumerate(tools)
    ]
    arguments = [tool.get("parameters") or {"type": "object"} for tool in tools]
    defined = {str(place): _moved(schema, f"#/$defs/{place}") for place, schema in enumerate(arguments)}
    return {"$defs": defined, "anyOf": calls}


def _moved(schema: Any, root: str) -> Any:
    """A schema that has become a part of another, at `root`: what it refers to in itself is there now."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + part[1:] if key == "$ref" and isinstance(part, str) and part.startswith("#") else _moved(part, root)
        for key, part in schema.items()
    }


def calls(text: str, names: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """The calls of known tools in an answer, as the protocol writes them, and the text beside them.

    An answer that is one call without tags, as a grammar makes it, is taken whole; so a tag in an argument stays there.
    """
    whole = text.strip()
    alone = _call(whole, 0, names)
    if alone and alone[1] == len(whole):
        return "", [alone[0]]
    beside, found, at = "", [], 0
    for opening in OPENING.finditer(text):
        if opening.start() < at:  # within the arguments of a call
            continue
        told = _call(text, opening.end(), names)
        closing = CLOSING.match(text, told[1]) if told else None
        if told and closing:
            beside += text[at : opening.start()]
            found.append(told[0])
            at = closing.end()
    return (beside + text[at:]).strip() if found else text, found


def _call(text: str, at: int, names: Sequence[str]) -> tuple[dict[str, Any], int] | None:
    """The call whose JSON begins at a place, and where it ends."""
    try:
        call, end = DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.get("name") not in names or not isinstance(call.get("arguments"), dict):
        return None
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function}, end
