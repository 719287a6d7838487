"""``foreword serve`` as a process: how it starts, and how it stops."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import psutil
import pytest

import serving_gateway as sg
from conftest import Cli, three_lines
from foreword.serving.gateway.launch import engine_config
from foreword.serving.settings import ServeSettings

SERVE = [sys.executable, "-m", "foreword", "serve"]
COUNTING = """
import sys
from foreword.serving.gateway.server import run
from foreword.serving.remote import RemoteEngine
from foreword.serving.settings import ServeSettings
_, script, model, prompts, grace = sys.argv
settings = ServeSettings(model=model, prompts=(prompts,), port=0, grace=float(grace), max_tokens=10**6)
engine = RemoteEngine([sys.executable, script], {"step": 0.02})
run(settings, engine, lambda line: print(line, file=sys.stderr, flush=True))
"""


class Process:
    """A server in a process, whose stderr is read all the while."""

    def __init__(self, command: list[str]) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        self._started = threading.Event()
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line)
            if " serves " in line:
                self._started.set()
        self._started.set()

    def address(self) -> str:
        """Where it listens, once it does."""
        assert self._started.wait(3 * sg.SOON), "it does not start"
        [line] = [line for line in self.lines if " serves "] or ["".join(self.lines)]
        found = re.match(r"(http://127\.0\.0\.1:\d+) serves ", line)
        assert found, line
        wait_for(found[1])
        return found[1]

    def ended(self) -> int:
        """Its exit code."""
        code = self.process.wait(sg.SOON)
        self._reader.join(sg.SOON)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


def wait_for(address: str) -> None:
    deadline = time.monotonic() + sg.SOON
    while True:
        try:
            httpx.get(f"{address}/health")
            return
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@contextmanager
def started(*command: str) -> Iterator[Process]:
    process = Process(list(command))
    try:
        yield process
    finally:
        process.process.kill()
        process.ended()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sg.make_store(tmp_path_factory.mktemp("store"))


def counting(model: Path, store: Path, grace: float) -> tuple[str, ...]:
    script = str(Path(__file__).parent / "counting_engine.py")
    return (sys.executable, "-c", COUNTING, script, str(model), str(store), str(grace))


def streamed(address: str, tokens: int, at_first: Any) -> list[dict[str, Any]]:
    """The events of a stream, which ends as it should; ``at_first`` is called at the first one."""
    body = {"model": sg.BASE, "prompt": "my parcel", "max_tokens": tokens, "stream": True}
    lines: list[str] = []
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=sg.SOON) as answer:
        for line in answer.iter_lines():
            if line and not lines:
                at_first()
            lines += [line] if line else []
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_sigterm_lets_streams_end_and_takes_nothing_new(model_folder: Path, store: Path) -> None:
    with started(*counting(model_folder, store, 20)) as server:
        address = server.address()
        after: list[str] = []

        def stop() -> None:
            server.process.terminate()
            after.append(refused_soon(address))

        events = streamed(address, 60, stop)
        assert len(events) == 60 and events[-1]["choices"][0]["finish_reason"] == "length"
        assert after == ["refused"]
        assert server.ended() == 0


def refused_soon(address: str) -> str:
    """Waits until new connections are refused, or new requests answered with 503."""
    deadline = time.monotonic() + sg.SOON
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{address}/health").status_code == 503:
                return "refused"
        except httpx.TransportError:
            return "refused"
        time.sleep(0.02)
    return "still taken"


def test_after_its_grace_a_stream_is_ended_cleanly(model_folder: Path, store: Path) -> None:
    with started(*counting(model_folder, store, 0.5)) as server:
        events = streamed(server.address(), 10**6, server.process.terminate)
        assert events[-1]["choices"][0]["finish_reason"] == "abort"
        assert server.ended() == 0
        assert not [line for line in server.lines if "Traceback" in line]


def test_the_command_serves_until_ctrl_c(model_folder: Path, store: Path) -> None:
    options = ["--port", "0", "--kv-memory", "8", "--prompt-memory", "4", "--threads", "1"]
    with started(*SERVE, "--model", str(model_folder), "--prompts", str(store), *options) as server:
        address = server.address()
        [said] = [line for line in server.lines if " serves " in line]
        assert said.endswith("with 7 soft prompts (transformers; no key needed from this machine)\n")
        answer = httpx.post(f"{address}/v1/classify", json={"model": "both", "input": "x"}, timeout=sg.SOON)
        assert answer.json()["data"][0]["label"] in ("complaint", "praise")
        [worker] = psutil.Process(server.process.pid).children()
        server.process.send_signal(signal.SIGINT)
        assert server.ended() == 130
        assert gone(worker) and not [line for line in server.lines if "Traceback" in line]


def test_stopping_while_the_model_loads(model_folder: Path, store: Path) -> None:
    slow = [*counting(model_folder, store, 1)]
    slow[2] = COUNTING.replace('{"step": 0.02}', '{"fault": "slow"}')
    with started(*slow) as server:
        deadline = time.monotonic() + sg.SOON
        while not psutil.Process(server.process.pid).children():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        [worker] = psutil.Process(server.process.pid).children()
        server.process.terminate()
        assert server.ended() == 0
        assert gone(worker)


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, though perhaps nobody has asked how."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_mistakes_are_told_before_anything_is_loaded(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    served = ("serve", "--model", model_folder)
    assert "--model" in three_lines(cli("serve"))[2]
    assert "no such" in " ".join(three_lines(cli(*served, "--prompts", tmp_path / "nothing")))
    assert "FOREWORD_API_KEYS" in three_lines(cli(*served, "--host", "0.0.0.0"))[2]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert str(port) in three_lines(cli(*served, "--port", port))[0]


def test_the_engine_is_told_what_the_settings_say() -> None:
    told = engine_config(ServeSettings(model="m", dtype="bfloat16", device="cpu", prompt_memory=100, threads=3))
    assert (told["model"], told["dtype"], told["device"], told["threads"]) == ("m", "bfloat16", "cpu", 3)
    assert told["prompt_memory"] == 125 and told["kv_memory"] == 1024
    assert engine_config(ServeSettings(model="m", kv_memory=7))["kv_memory"] == 7
