"""Our own OpenAPI page, made from the very models that check requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from foreword.serving.gateway.replies import ErrorReply
from foreword.serving.gateway.sse import DONE

_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The request cannot be answered as it stands.",
    "401": "No valid key.",
    "403": "The key, or the site that asks, may not do this.",
    "404": "No such model or soft prompt.",
    "405": "Another method.",
    "413": "The body is too large.",
    "415": "The body is no JSON by its header.",
    "500": "A fault of the server.",
    "503": "The queue is full or the engine is starting; Retry-After says when to try again.",
    "504": "It took too long.",
}


@dataclass(frozen=True)
class Operation:
    """An endpoint as it is described. ``reply``: a model, or a media type that has none. ``event``: of a stream."""

    method: str
    path: str
    summary: str
    reply: type[BaseModel] | str
    body: type[BaseModel] | None = None
    event: type[BaseModel] | None = None
    query: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    public: bool = False


def describe(operations: Sequence[Operation], version: str, with_keys: bool) -> dict[str, Any]:
    """The page.

    Args:
        operations: the endpoints.
        version: of this package.
        with_keys: whether keys are needed.
    """
    schemas = _schemas(operations)
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, with_keys)
    components: dict[str, Any] = {"schemas": schemas}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.2.0",
        "info": {"title": "Foreword", "version": version, "description": "Many soft prompts over one frozen model."},
        "paths": paths,
        "components": components,
    }


def _schemas(operations: Sequence[Operation]) -> dict[str, Any]:
    bodies = [(o.body, "validation") for o in operations if o.body]
    replies = [(o.reply, "serialization") for o in operations if not isinstance(o.reply, str)]
    replies += [(o.event, "serialization") for o in operations if o.event]
    models: Any = [*bodies, *replies, (ErrorReply, "serialization")]
    _, found = models_json_schema(models, ref_template=_REF)
    schemas: dict[str, Any] = found["$defs"]
    return schemas


def _operation(operation: Operation, with_keys: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": operation.path.strip("/").replace("/", "_").replace("{", "").replace("}", "") or "page",
        "responses": {"200": _answer(operation)} | {status: _error(what) for status, what in _ERRORS.items()},
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _json(operation.body)}
    if operation.query or "{" in operation.path:
        described["parameters"] = _parameters(operation)
    if with_keys and not operation.public:
        described["security"] = [{"key": []}]
    return described


def _answer(operation: Operation) -> dict[str, Any]:
    if isinstance(operation.reply, str):
        return {"description": "As it says.", "content": {operation.reply: {"schema": {"type": "string"}}}}
    content = _json(operation.reply)
    if operation.event:
        content["text/event-stream"] = {"itemSchema": _event(operation.event)}
    return {"description": "The answer.", "content": content}


def _event(model: type[BaseModel]) -> dict[str, Any]:
    """An event of a stream: a piece of the answer, an error in its place, or the end."""
    said = {"anyOf": [_ref(model), _ref(ErrorReply)]}
    piece = {"type": "string", "contentMediaType": "application/json", "contentSchema": said}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": DONE}, piece]}}}


def _error(what: str) -> dict[str, Any]:
    return {"description": what, "content": _json(ErrorReply)}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(model)}}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    named = [p.partition("}")[0] for p in operation.path.split("{")[1:]]
    in_path = [{"name": n, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for n in named]
    return in_path + [{"name": n, "in": "query", "schema": dict(schema)} for n, schema in operation.query.items()]
