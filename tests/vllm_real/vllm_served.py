"""Engines that run in an event loop of their own, the library beside them, and a real vLLM server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serving_checks as checks
from foreword.backbone.load import Backbone
from foreword.serving.engine import Capabilities, Engine

SIZES = (4, 1, 32, 9, 40)
"""Rows of soft prompts: fewer than a block of the cache (32 on CPU), a block, and more."""
STARTING = 600.0
KEY = "a-key-of-the-server"


@dataclass
class Served:
    """A started engine with soft prompts in it."""

    runner: asyncio.Runner
    engine: Engine
    capabilities: Capabilities
    reference: checks.Reference

    def run(self, work: Any) -> Any:
        return self.runner.run(asyncio.wait_for(work, 120))


@contextmanager
def served_by(engine: Engine, backbone: Backbone, scale: float = 0.3) -> Iterator[Served]:
    """Starts an engine and closes it."""
    prompts = checks.prompts_of(backbone, SIZES, scale=scale)
    with asyncio.Runner() as runner:
        capabilities = runner.run(engine.start())
        try:
            runner.run(checks.load(engine, prompts))
            yield Served(runner, engine, capabilities, checks.Reference(backbone, prompts))
        finally:
            runner.run(engine.close())


@contextmanager
def server(python: str, folder: Path, *more: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A vLLM server of a model, as somebody else would start it; its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: Sequence[str] = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32",
        "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, "--enable-prompt-embeds", "--enforce-eager",
        "--block-size", "32", "--kv-cache-memory-bytes", str(1 << 25), "--enable-prompt-tokens-details", *more,
    ]  # fmt: skip
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + STARTING
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError("the vLLM server did not come up")
