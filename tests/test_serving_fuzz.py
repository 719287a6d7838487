"""Requests made up from our own OpenAPI page: never a fault of the server, and every answer as the page says.

The same 400 each time; ``FOREWORD_FUZZ_CASES`` asks for so many new ones.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.python.asgi import shutdown_lifespans
from starlette.types import ASGIApp, Receive, Scope, Send

import serving_gateway as sg
from foreword.serving.gateway.app import OPERATIONS, create_app
from foreword.serving.gateway.openapi import Operation
from foreword.serving.settings import ServeSettings

CASES = int(os.environ.get("FOREWORD_FUZZ_CASES", "400"))
POSTS = [o for o in OPERATIONS if o.body]
GETS = [o for o in OPERATIONS if not o.body]
SHARE = CASES * 19 // 20 // len(POSTS)
"""Cases of an operation with a body; the others share the last twentieth."""
NAMES = (sg.BASE, "tweets", "other", "bare", "writes", "pairs", "prefix", "both")
LIMITS = {"max_tokens": 16, "max_texts": 8, "max_queue": 64}
"""Small, so that requests which are answered and requests which are too large both come often."""
CONFORM = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
HERE = {"Host": "127.0.0.1"}


class Started:
    """The application and its engine, on whichever event loop it is called."""

    def __init__(self, model: Path, store: Path) -> None:
        self.engine = sg.tiny_engine(model)
        self.settings = ServeSettings(model=str(model), prompts=(str(store),), **LIMITS)  # type: ignore[arg-type]
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            assert self.app is not None
            await self.app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        base, registry = await sg.opened(self.engine, self.settings)
        self.app = create_app(self.settings, self.engine, registry, base)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.engine.close()
        await send({"type": "lifespan.shutdown.complete"})


@pytest.fixture(scope="module")
def api(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The description, as schemathesis reads it."""
    folder = tmp_path_factory.mktemp("fuzz")
    model = sg.with_chat_template(model_folder, folder / "model")
    app = Started(model, sg.make_store(folder / "store"))
    described = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HERE)
    described.config.max_stream_events = 1000  # streams are read to their ends
    yield described
    shutdown_lifespans()


def asked(case: Any, seed: int) -> None:
    """Three of four times the request is for a model there is, in words it knows: else nearly none goes deep."""
    if seed % 4 == 0 or not isinstance(case.body, dict):
        return
    body = dict(case.body)
    for name in {"model", "name"} & body.keys():
        body[name] = NAMES[seed // 4 % len(NAMES)]
    for name in ("max_tokens", "max_completion_tokens", "n"):
        if isinstance(body.get(name), int):
            body[name] = 1 + body[name] % 4
    for name in ("input", "columns"):
        if isinstance(body.get(name), dict):
            body[name] = {"text": f"x{[*body[name].values(), 0][0]}"}
    if isinstance(body.get("task_of"), str):
        body["model"], body["task_of"] = sg.BASE, "tweets"
    case.body = body


def tried(api: Any, operation: Operation, mode: GenerationMode, most: int) -> Counter[int]:
    """Statuses of so many cases of an operation."""
    load_all_checks()
    checks = CHECKS.get_by_names(CONFORM)
    found: Counter[int] = Counter()
    described = api[operation.path][operation.method]

    @settings(max_examples=most, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate], derandomize="FOREWORD_FUZZ_CASES" not in os.environ)  # fmt: skip
    @given(case=described.as_strategy(generation_mode=mode), seed=st.integers(0, 999))
    def check(case: Any, seed: int) -> None:
        asked(case, seed)
        answer = case.call(headers=HERE, timeout=sg.SOON)
        found[answer.status_code] += 1
        case.validate_response(answer, checks=checks)
        if answer.headers["content-type"][0].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n")

    check()
    return found


@pytest.mark.parametrize("operation", POSTS, ids=lambda o: o.path)
def test_made_up_bodies(api: Any, operation: Operation) -> None:
    fitting = tried(api, operation, GenerationMode.POSITIVE, SHARE * 3 // 4)
    unfit = tried(api, operation, GenerationMode.NEGATIVE, SHARE - SHARE * 3 // 4)
    assert sum((fitting + unfit).values()) >= SHARE
    deep = 3 if "unload" in operation.path else SHARE // 20  # a name is unloaded once
    assert fitting[200] > deep, f"hardly anything went deep: {fitting}"
    # Not all of them are: some are unfit for the maker of cases alone, or name what nobody has (404).
    refused = unfit[400] + unfit[404] + unfit[415]
    assert refused > 0.5 * sum(unfit.values()), f"hardly anything was refused: {unfit}"


@pytest.mark.parametrize("operation", GETS, ids=lambda o: o.path)
def test_made_up_questions(api: Any, operation: Operation) -> None:
    most = CASES // 40 if operation.query or "{" in operation.path else 2
    assert sum(tried(api, operation, GenerationMode.POSITIVE, most).values()) >= 1
    if operation.query:
        assert tried(api, operation, GenerationMode.NEGATIVE, most)[400] >= 1
