"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from foreword.errors import ForewordError, nearest
from foreword.serving.engine import EngineDown, EngineRefused
from foreword.serving.store import UnknownName

RETRY_SECONDS = 2
"""What clients are told to wait when the server is full or its engine is starting anew."""
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    503: "unavailable_error",
    504: "timeout_error",
}

_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(RETRY_SECONDS)}}


@dataclass
class ApiError(Exception):
    """An answer that is an error."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As a response."""
        return JSONResponse(self.body(), self.status, {**_HEADERS.get(self.status, {}), **self.headers})


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake."""
    return ApiError(400, message, param, code)


def unavailable(message: str) -> ApiError:
    """Not now, but soon again."""
    return ApiError(503, message, None, "unavailable")


def as_api_error(error: Exception) -> ApiError | None:
    """What the client is told of an exception; None when it is nothing a client should hear of."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            message = "there is nothing at this path" if error.status_code == 404 else str(error.detail)
            return ApiError(error.status_code, message, headers=error.headers or {})
        case UnknownName():
            return ApiError(404, error.what, "model", "model_not_found")
        case EngineDown():
            return unavailable("the model is starting again; try again in a moment")
        case EngineRefused():
            return refused(str(error) or "the engine refuses this request")
        case ForewordError():
            return refused(f"{error.what} ({error.fix})")
    return None


def from_validation(error: ValidationError, known: Iterable[str], cannot: Mapping[str, str]) -> ApiError:
    """What is wrong with the first bad field of a body.

    Args:
        error: pydantic's.
        known: fields there are.
        cannot: fields of OpenAI's that are not served, and why.
    """
    found = error.errors(include_url=False, include_input=False, include_context=False)
    fields = [str(e["loc"][0]) for e in found if e["loc"]]
    if field := next((f for f in fields if f in cannot), ""):
        return refused(f"'{field}' is not served here: {cannot[field]}", field, "unsupported_parameter")
    # A field that may be of several types brings an error for each; the deepest tells of the one that was meant.
    of_field = [e for e in found if e["loc"][:1] == found[0]["loc"][:1]]
    place, details = max(((_place(e), e) for e in of_field), key=lambda pair: len(pair[0]))
    if details["type"] == "extra_forbidden":
        hint = nearest(place, known)
        return refused(f"there is no field '{place}'{f'; {hint}' if hint else ''}", place, "unknown_parameter")
    if details["type"] == "json_invalid":
        return refused(details["msg"].replace("Invalid JSON", "the body is not JSON"), None, "invalid_json")
    wanted = dict.fromkeys(e["msg"] for e in of_field if _place(e) == place)
    message = " or ".join(wanted).replace(" or Input should be", " or")
    return refused(f"{place}: {message}" if place else message, place or None, "invalid_value")


def _place(details: ErrorDetails) -> str:
    """Where in the body, as ``messages[0].content``; names of types, which are no fields, left out."""
    found = ""
    for part in details["loc"]:
        if isinstance(part, int):
            found += f"[{part}]"
        elif part.isidentifier() and part not in _TYPE_NAMES:
            found += f".{part}" if found else part
    return found


_TYPE_NAMES = {"str", "int", "list", "dict", "bool", "float"}
