"""vLLM's doubles: a server and an ``AsyncLLM`` that know what the real ones answered, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import enum
import io
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_scenario

DATA = Path(__file__).parent / "data"


def record_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two requests ask the same: embeddings are compared up to rounding."""
    if not isinstance(a, dict) or not isinstance(b, dict) or "prompt_embeds" not in a:
        return bool(a == b)
    rest = [{k: v for k, v in x.items() if k != "prompt_embeds"} for x in (a, b)]
    return rest[0] == rest[1] and vllm_scenario.same_rows(a["prompt_embeds"], b["prompt_embeds"])


def recall(
    exchanges: list[dict[str, Any]], answered: list[int], fits: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
    """The recorded exchange that fits, of equal ones the first that was not had yet; notes that it was had."""
    found = [i for i, e in enumerate(exchanges) if fits(e)]
    if not found:
        return None
    answered.append(next((i for i in found if i not in answered), found[0]))
    return exchanges[answered[-1]]


# --- over HTTP -------------------------------------------------------------------------------------


@dataclass
class Server:
    """Answers recorded requests. ``pause_after``: events of a stream after which it waits for its client to leave."""

    exchanges: list[dict[str, Any]]
    key: str
    healthy: bool = True
    pause_after: int = 0
    unknown: list[Any] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            method, path, body, key = await self._request(reader)
            status, answer = self._answer(method, path, body, key)
            kind = "text/event-stream" if answer.startswith("data: ") else "application/json"
            writer.write(f"HTTP/1.1 {status} -\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n".encode())
            if self.pause_after and kind == "text/event-stream":
                writer.write("\n\n".join([*answer.split("\n\n")[: self.pause_after], ""]).encode())
                await writer.drain()
                await reader.read()
                self.left.set()
            else:
                writer.write(answer.encode())
                await writer.drain()
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _request(self, reader: asyncio.StreamReader) -> tuple[str, str, Any, str]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:])}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        return method, path, json.loads(content) if content else None, headers.get("authorization", "")

    def _answer(self, method: str, path: str, body: Any, key: str) -> tuple[int, str]:
        if path == "/health":
            return (200 if self.healthy else 503), ""
        if path.startswith("/v1") and key != f"Bearer {self.key}":
            return 401, '{"error":"Unauthorized"}'
        if body and "prompt_embeds" in body:
            rows = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
            body = {**body, "prompt_embeds": vllm_scenario.packed(rows)}
        asked = {"method": method, "path": path, "body": body}
        if found := recall(self.exchanges, self.answered, lambda e: all(same(asked[k], e[k]) for k in asked)):
            return found["status"], found["answer"]
        self.unknown.append(asked)
        return 400, '{"error":{"message":"a request that is not in the record"}}'


@asynccontextmanager
async def serving(exchanges: list[dict[str, Any]], key: str) -> AsyncIterator[Server]:
    """A server on a free port of this machine; a request that is not in the record fails the test."""
    double = Server(exchanges, key)
    listening = await asyncio.start_server(double.serve, "127.0.0.1", 0, limit=1 << 24)
    double.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield double
    finally:
        listening.close()
    assert not double.unknown


# --- in process ------------------------------------------------------------------------------------


class ClientError(Exception):
    pass


class OutputKind(enum.Enum):
    DELTA, FINAL_ONLY = 1, 2


class AsyncLLM:
    """Its interface as far as our engine uses it. ``record``: what the real one was asked and answered."""

    record: dict[str, Any]
    answered: list[int]
    unknown: list[Any]
    aborted: list[str]
    ended: list[str]

    def __init__(self, arguments: dict[str, Any]) -> None:
        asked, known = ({**a, "model": "", "seed": 0} for a in (arguments, self.record["arguments"]))
        assert asked == known
        model = self.record["model"]
        self.model_config = SimpleNamespace(
            get_vocab_size=lambda: model["vocab_size"],
            get_hidden_size=lambda: model["hidden_size"],
            hf_text_config=SimpleNamespace(eos_token_id=[0, 5]),
            **{k: model[k] for k in ("max_model_len", "dtype", "max_logprobs")},
        )
        self.errored = False

    @classmethod
    def from_engine_args(cls, arguments: dict[str, Any]) -> AsyncLLM:
        return cls(arguments)

    async def generate(self, prompt: dict[str, Any], parameters: dict[str, Any], request_id: str) -> AsyncIterator[Any]:
        asked = {**prompt}
        if "prompt_embeds" in asked:
            asked["prompt_embeds"] = vllm_scenario.packed(asked["prompt_embeds"])
        how = {**parameters, "output_kind": parameters["output_kind"].name}
        plain = json.loads(json.dumps(how))
        known = recall(
            self.record["exchanges"], self.answered, lambda e: same(asked, e["prompt"]) and plain == e["parameters"]
        )
        if known is None:
            self.unknown.append((asked, how))
            raise ClientError("a request that is not in the record")
        try:
            for output in known["outputs"]:
                await asyncio.sleep(0)
                yield _output(output)
        finally:
            self.ended.append(request_id)

    async def abort(self, ids: str | list[str]) -> None:
        self.aborted.extend([ids] if isinstance(ids, str) else ids)

    def shutdown(self, timeout: float) -> None:
        self.errored = True


def _output(kept: dict[str, Any]) -> SimpleNamespace:
    logprobs = kept["logprobs"] and [
        {int(i): SimpleNamespace(logprob=p) for i, p in at.items()} for at in kept["logprobs"]
    ]
    completion = SimpleNamespace(token_ids=kept["token_ids"], logprobs=logprobs, finish_reason=kept["finish_reason"])
    return SimpleNamespace(outputs=[completion], num_cached_tokens=kept["num_cached_tokens"])


def install(monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]) -> type[AsyncLLM]:
    """Puts the double where the engine looks for vLLM, until the test ends."""
    kept: dict[str, Any] = {name: [] for name in ("answered", "unknown", "aborted", "ended")}
    double = type("AsyncLLM", (AsyncLLM,), {"record": record, **kept})

    def parameters(**how: Any) -> dict[str, Any]:
        if how["temperature"] > 2.0:
            raise ClientError(record["answers"]["refused"])
        return how

    names: dict[str, dict[str, Any]] = {
        "vllm": {"SamplingParams": parameters},
        "vllm.sampling_params": {"RequestOutputKind": OutputKind},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": dict},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.inputs.engine": {"embeds_input": _embeds_input, "tokens_input": _tokens_input},
        "vllm.exceptions": {"VLLMClientError": ClientError, "GracefulHTTPError": InterruptedError},
        "vllm.v1.engine.async_llm": {"AsyncLLM": double},
        "vllm.v1.engine.exceptions": {"EngineDeadError": ConnectionError, "EngineGenerateError": ArithmeticError},
        "vllm.v1.metrics.reader": {"get_metrics_snapshot": lambda: METRICS},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return double


METRICS = [
    SimpleNamespace(name="vllm:num_requests_running", value=3.0),
    SimpleNamespace(name="vllm:prefix_cache_hits", value=8),
    SimpleNamespace(name="vllm:kv_cache_usage_perc", value=0.25),
    SimpleNamespace(name="vllm:e2e_request_latency_seconds", sum=1.0),
]


def _embeds_input(rows: Any, **more: Any) -> dict[str, Any]:
    return {"type": "embeds", "prompt_embeds": rows, **{k: v for k, v in more.items() if v is not None}}


def _tokens_input(ids: list[int], cache_salt: str | None = None) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": ids, **({"cache_salt": cache_salt} if cache_salt else {})}
