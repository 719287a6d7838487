"""Talking to a vLLM server over HTTP: questions, streams, health, and what its refusals mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from foreword.serving.engine import EngineDown, EngineError, EngineRefused

COMPLETIONS = "/v1/completions"
CONNECTING, READING = 10.0, 10.0
"""Most seconds until a connection stands, and until a page of metrics has come."""


class VllmServer:
    """One server. ``beat``: seconds that its health may take to be known."""

    def __init__(self, url: str, api_key: str, beat: float) -> None:
        key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        # A text may wait in the server's queue for long; a server that is gone is noticed by its health.
        self._client = httpx.AsyncClient(
            base_url=url, headers=key, limits=limits, timeout=httpx.Timeout(None, connect=CONNECTING)
        )
        self._beat = max(beat, 1.0)
        self._asking: set[asyncio.Timeout] = set()

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def healthy(self) -> bool | None:
        """Whether it answers and says that its engine runs; None where no answer came in time."""
        try:
            return (await self._client.get("/health", timeout=self._beat)).status_code == 200
        except httpx.TimeoutException:
            return None
        except httpx.HTTPError:
            return False

    def give_up(self) -> None:
        """Ends the questions that wait for an answer."""
        for scope in self._asking:
            scope.reschedule(asyncio.get_running_loop().time())

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One answer to one question."""
        async with self._until_given_up():
            answer = await self._client.request(method, path, json=body)
        if answer.status_code != 200:
            raise _error(answer)
        found: dict[str, Any] = answer.json()
        return found

    async def events(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What a completion streams; closing the iterator closes the connection, upon which the server aborts."""
        try:
            async with self._client.stream("POST", COMPLETIONS, json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise _error(answer)
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _checked(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as e:
            raise EngineDown(f"the vLLM server does not answer: {e!r}") from e

    async def metrics(self) -> Iterator[tuple[str, float]]:
        """Names and values, labels left out; none where it does not answer."""
        text = ""
        with suppress(httpx.HTTPError):
            text = (await self._client.get("/metrics", timeout=READING)).text
        lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith("vllm:"))
        return ((name.partition("{")[0], float(value)) for name, _, value in lines)

    @asynccontextmanager
    async def _until_given_up(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None) as scope:
                self._asking.add(scope)
                try:
                    yield
                finally:
                    self._asking.discard(scope)
        except TimeoutError:
            raise EngineDown("the vLLM server does not answer") from None
        except httpx.HTTPError as e:
            raise EngineDown(f"the vLLM server does not answer: {e!r}") from e


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    """An event of a stream that is no error."""
    if "error" in event:
        raise EngineError(f"the vLLM server failed: {_message(event['error'])}")
    return event


def _error(answer: httpx.Response) -> EngineError:
    """What a status means. The server's words on lengths and values are meant for whoever asked."""
    try:
        message = _message(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    if answer.status_code in (401, 403):
        return EngineError(f"the vLLM server does not take the key: {message}")
    if 400 <= answer.status_code < 500:
        return EngineRefused(message)
    return EngineDown(f"the vLLM server answers {answer.status_code}: {message}")


def _message(said: Any) -> str:
    return str(said["message"] if isinstance(said, dict) else said)
