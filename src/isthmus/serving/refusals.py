"""Why a request gets no answer, in the form of OpenAI's protocol: fixed words of ours, no path, no trace."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from isthmus.serving.answers import Broken, Full, Late, Stopping, TooLong
from isthmus.types import DataError


class Refusal(Exception):
    """A status and the four fields of an error body."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


ROUTED = {404: "there is nothing at this path", 405: "this path takes another method"}


def left() -> Refusal:
    """Nobody reads it; the log and the metrics do."""
    return Refusal(499, "the client has gone", "client_closed_request")


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The request itself is wrong."""
    return Refusal(400, message, code, param)


def refusal(error: Exception) -> Refusal:
    """What is told of an error; of one that is not ours, nothing."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):  # Starlette's own: no such path, wrong method
        words = ROUTED.get(error.status_code, "the request is refused")
        return Refusal(error.status_code, words, headers=dict(error.headers or {}))
    if isinstance(error, TooLong):
        return invalid(error.cause, "messages", "context_length_exceeded")
    if isinstance(error, Full):
        return Refusal(429, error.cause, "queue_full", headers={"Retry-After": "1"})
    if isinstance(error, Late):
        return Refusal(503, error.cause, "deadline_exceeded", headers={"x-should-retry": "false"})
    if isinstance(error, Stopping):
        return Refusal(503, error.cause, "stopping", headers={"Retry-After": "5"})
    if isinstance(error, Broken):
        return Refusal(500, error.cause, "model_error")
    if isinstance(error, DataError):
        return invalid(error.cause, "messages")
    return Refusal(500, "the server failed on this request", "internal_error")
