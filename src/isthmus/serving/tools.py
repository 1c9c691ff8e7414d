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

CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
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


def calls(text: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The calls of known tools in an answer, as the protocol writes them; empty where it is ordinary text."""
    found = []
    for piece in CALL.findall(text) or [text]:
        try:
            call = json.loads(piece)
        except (ValueError, RecursionError):
            continue
        if isinstance(call, dict) and call.get("name") in names and isinstance(call.get("arguments"), dict):
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
            found.append({"id": f"call_{secrets.token_hex(8)}", "type": "function", "function": function})
    return found
