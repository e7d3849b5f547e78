"""Errors of requests, in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "unsupported_media_type",
    421: "invalid_request_error",
    422: "unprocessable_clip",
    429: "rate_limit_error",
    500: "internal_error",
    503: "service_unavailable",
    504: "timeout_error",
}


@dataclass
class ApiError(Exception):
    """A request without an answer.

    Attributes:
        status: of HTTP.
        message: what, where and the remedy, in one line.
        code: for programs, such as "queue_full"; also the cause under which it is counted.
        param: the field of the request that is wrong.
        retry_after_s: when the client should ask again.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        return JSONResponse(self.body(), self.status, headers)


def bad_request(message: str, param: str | None = None, code: str = "invalid_request") -> ApiError:
    return ApiError(400, message, code, param)


def engine_down() -> ApiError:
    return ApiError(503, "the engine has stopped; the server is about to end, ask again later", "engine_down")


ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

MEANINGS = {
    400: "The request is wrong: `param` says where.",
    401: "No API key, or a wrong one.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body or the clip is too large.",
    415: "The content is no clip, or the body neither JSON nor a form.",
    422: "The clip cannot be read or asked about.",
    429: "As many requests wait as may: ask again after `Retry-After` seconds.",
    500: "A defect of the server.",
    503: "The engine is not there: it loads, ends, or has failed.",
    504: "There was no answer in time.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of these statuses."""
    content = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": MEANINGS[status], "content": content} for status in statuses}
