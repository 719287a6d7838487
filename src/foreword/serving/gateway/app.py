"""The application: which path is whose, and what stands in front of all of them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from importlib.metadata import version
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from foreword.errors import ForewordError
from foreword.serving.engine import Engine, EngineDown, EngineRefused
from foreword.serving.gateway import site
from foreword.serving.gateway.admin import load_soft_prompt, unload_soft_prompt
from foreword.serving.gateway.auth import Guard
from foreword.serving.gateway.chat import chat
from foreword.serving.gateway.classify import classify
from foreword.serving.gateway.completions import completions
from foreword.serving.gateway.errors import ApiError, as_api_error, from_validation
from foreword.serving.gateway.limits import Queue, read_body, watched
from foreword.serving.gateway.logprobs import Vocabulary
from foreword.serving.gateway.logs import Call, RequestLog
from foreword.serving.gateway.metrics import Metrics
from foreword.serving.gateway.models import MOST, list_models, one_model
from foreword.serving.gateway.openapi import Operation, describe
from foreword.serving.gateway.replies import (
    Chat,
    ChatChunk,
    Classification,
    Completion,
    Health,
    LoadReply,
    ModelCard,
    ModelList,
    UnloadReply,
)
from foreword.serving.gateway.schema import (
    CANNOT,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    LoadRequest,
    UnloadRequest,
)
from foreword.serving.gateway.service import Gateway
from foreword.serving.registry import Registry
from foreword.serving.settings import MB, ServeSettings
from foreword.serving.text import Base

Body = TypeVar("Body", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[ASGIApp]]
Get = Callable[[Gateway, Request], Awaitable[Response]]
Post = Callable[[Gateway, Any, Call], Coroutine[Any, Any, ASGIApp]]

GETS: tuple[tuple[Operation, Get], ...] = (
    (Operation("GET", "/health", "Whether requests can be taken.", Health, public=True), site.health),
    (Operation("GET", "/ping", "The same.", Health, public=True), site.health),
    (Operation("GET", "/metrics", "Counters for Prometheus.", "text/plain"), site.metrics),
    (
        Operation(
            "GET",
            "/v1/models",
            "The plain model and all soft prompts.",
            ModelList,
            query={"limit": {"type": "integer", "minimum": 1, "maximum": MOST}, "after": {"type": "string"}},
        ),
        list_models,
    ),
    (Operation("GET", "/v1/models/{id}", "One of them, with its template and classes.", ModelCard), one_model),
)
POSTS: tuple[tuple[Operation, Post], ...] = (
    (
        Operation(
            "POST", "/v1/completions", "Goes on from texts, or from columns.", Completion, CompletionRequest, Completion
        ),
        completions,
    ),
    (Operation("POST", "/v1/chat/completions", "Answers in a chat.", Chat, ChatRequest, ChatChunk), chat),
    (Operation("POST", "/v1/classify", "Label probabilities.", Classification, ClassifyRequest), classify),
    (
        Operation("POST", "/v1/load_soft_prompt", "Loads a soft prompt (admin).", LoadReply, LoadRequest),
        load_soft_prompt,
    ),
    (
        Operation("POST", "/v1/unload_soft_prompt", "Unloads one (admin).", UnloadReply, UnloadRequest),
        unload_soft_prompt,
    ),
)
OPERATIONS = tuple(operation for operation, _ in (*GETS, *POSTS))


def create_app(settings: ServeSettings, engine: Engine, registry: Registry, base: Base) -> Starlette:
    """The gateway as an ASGI application; its ``state.gateway`` is what the server stops it by.

    Args:
        settings: limits and keys, checked.
        engine: started, on the event loop that will run the application.
        registry: over that engine.
        base: the engine's model.
    """
    metrics = Metrics(base.name)
    gateway = Gateway(
        settings, engine, registry, base, metrics, Queue(settings.max_queue, metrics), Vocabulary(base.tokenizer)
    )
    handlers = dict.fromkeys((ApiError, HTTPException, ForewordError, EngineDown, EngineRefused), _failed)
    app = Starlette(
        routes=_routes(gateway),
        middleware=[Middleware(RequestLog, metrics=metrics), Middleware(Guard, settings=settings)],
        exception_handlers=handlers,
    )
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app


def _routes(gateway: Gateway) -> list[Route]:
    described = json.dumps(describe(OPERATIONS, version("foreword"), not gateway.settings.open)).encode()

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    return [
        *(Route(_starlette(o.path), _get(gateway, work)) for o, work in GETS),
        *(Route(o.path, _post(gateway, o.body, work), methods=["POST"]) for o, work in POSTS if o.body),
        Route("/openapi.json", openapi),
        Route("/", _get(gateway, site.Page())),
    ]


def _starlette(path: str) -> str:
    """The path as starlette writes it: a name may have slashes in it, as hub ids do."""
    return path.replace("{id}", "{id:path}")


def _get(gateway: Gateway, work: Get) -> Endpoint:
    async def endpoint(request: Request) -> ASGIApp:
        return await work(gateway, request)

    return endpoint


def _post(gateway: Gateway, model: type[Body], work: Post) -> Endpoint:
    settings = gateway.settings

    async def endpoint(request: Request) -> ASGIApp:
        call: Call = request.state.call
        require_json(request)
        content = await read_body(request, settings.max_body * MB, settings.request_seconds)
        body = parsed(model, content)
        return await watched(
            work(gateway, body, call), request.receive, max(settings.request_seconds - call.seconds, 0.0)
        )

    return endpoint


def require_json(request: Request) -> None:
    """Refuses a body that does not say it is JSON (forms of other sites' pages cannot say so)."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON, with the header 'Content-Type: application/json'", None, "not_json")


def parsed(model: type[Body], content: bytes) -> Body:
    """A body as its model; the parser stops at deep nesting, and takes no NaN, broken UTF-8 or half characters."""
    try:
        return model.model_validate_json(content)
    except ValidationError as e:
        raise from_validation(e, model.model_fields, CANNOT) from None


async def _failed(request: Request, error: Exception) -> Response:
    found = as_api_error(error)
    assert found is not None, "only what it knows is registered"
    request.state.call.error = found.code or ""
    return found.response()
