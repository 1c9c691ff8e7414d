"""What the server takes and gives, as an OpenAPI document made from the models that read the requests."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from isthmus.serving.protocol import ChatRequest, EmbeddingRequest

ERRORS = {
    400: "The request is wrong.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    408: "The body took too long to arrive.",
    413: "The body or a picture is too large.",
    415: "The Content-Type is not application/json.",
    421: "The Host header does not name this server.",
    429: "Too many requests wait.",
    503: "The deadline has passed, or the server is stopping.",
}
"""Everything that is told of an error; 500 is a fault of the server's and stands in no description."""
READ = (401, 404, 421)
STOPPING = {"503": {"description": "The server is stopping.", "content": {"application/json": {}}}}


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    _, made = models_json_schema(
        [(ChatRequest, "validation"), (EmbeddingRequest, "validation")], ref_template="#/components/schemas/{model}"
    )
    texts = {name: {"type": ["string", "null"]} for name in ("param", "code")}
    error = {"type": "object", "properties": {"message": {"type": "string"}, "type": {"type": "string"}} | texts}
    schemas = made["$defs"] | {"Error": {"type": "object", "properties": {"error": error}, "required": ["error"]}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Isthmus", "version": version("isthmus")},
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _asked("ChatRequest", "application/json", "text/event-stream")},
            "/v1/embeddings": {"post": _asked("EmbeddingRequest", "application/json")},
            "/v1/models": {"get": {"responses": _answers(READ, "application/json")}},
            "/metrics": {"get": {"responses": _answers(READ, "text/plain")}},
            "/health": {"get": {"security": [], "responses": _answers((421,), "application/json") | STOPPING}},
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _asked(model: str, *kinds: str) -> dict[str, Any]:
    """A route that reads a body."""
    body = {"required": True, "content": {"application/json": {"schema": _reference(model)}}}
    return {"requestBody": body, "responses": _answers(tuple(ERRORS), *kinds)}


def _answers(statuses: tuple[int, ...], *kinds: str) -> dict[str, Any]:
    refused = {
        str(status): {
            "description": ERRORS[status],
            "content": {"application/json": {"schema": _reference("Error")}},
        }
        for status in statuses
    }
    return {"200": {"description": "The answer.", "content": {kind: {} for kind in kinds}}} | refused


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
