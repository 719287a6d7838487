"""Whom the gateway serves, how much it takes, and that nothing hangs."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import serving_gateway as sg
import serving_parts as parts
from counting_engine import CountingEngine
from foreword.errors import ForewordError
from foreword.serving.engine import Capabilities, Request, ScoreRequest, Stats, Token, UnknownPrompt
from foreword.serving.gateway.auth import Keys
from foreword.serving.gateway.metrics import Metrics
from foreword.serving.registry import Usage
from foreword.serving.remote import Limits, RemoteEngine
from foreword.serving.settings import ServeSettings, check_settings, is_loopback, with_environment

COMPLETIONS = "/v1/completions"
COUNTING = [sys.executable, str(Path(__file__).parent / "counting_engine.py")]
TEXT = {"model": sg.BASE, "prompt": "my parcel is late"}
LONG = {**TEXT, "max_tokens": 480, "ignore_eos": True}
WITH_KEYS = {"api_keys": ("first-key", "second-key"), "admin_keys": ("admin-key",)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sg.make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def world(model_folder: Path, store: Path) -> Iterator[sg.World]:
    with sg.tiny_world(model_folder, store) as made:
        yield made


@pytest.fixture(scope="module")
def counting(model_folder: Path, store: Path) -> Iterator[sg.World]:
    """An engine that writes as long as it is let."""
    with sg.world(CountingEngine(step=0.001), model_folder, store, max_tokens=10**6) as made:
        yield made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def until(true: Any, what: str) -> None:
    """Waits until something is true."""
    deadline = time.monotonic() + sg.SOON
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def counter(served: sg.Served, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", served.client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def aborted(served: sg.Served) -> float:
    return counter(served, f'vllm:request_success_total{{finished_reason="abort",model_name="{sg.BASE}"}}')


# --- keys -----------------------------------------------------------------------------------------


def test_everything_but_health_and_page_wants_a_key(world: sg.World) -> None:
    with world.server(**WITH_KEYS) as served:
        for path in ("/health", "/ping", "/"):
            assert served.client.get(path).status_code == 200
        for path in ("/v1/models", "/v1/models/tweets", "/metrics", "/openapi.json", "/nothing"):
            answer = served.client.get(path)
            assert refusal(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert served.client.get(path, headers=bearer("first-key")).status_code in (200, 404)
        for path in (COMPLETIONS, "/v1/chat/completions", "/v1/classify", "/v1/load_soft_prompt", "/"):
            assert served.post(path).status_code == 401


def test_only_whole_keys_in_their_place_count(world: sg.World) -> None:
    with world.server(**WITH_KEYS) as served:
        bad = ("first-key", "Basic first-key", "Bearer", "first-key Bearer", "Bearer first", "Bearer first-key2")
        for header in (*bad, "Bearer first-key second-key", "Bearer FIRST-KEY"):
            assert served.client.get("/v1/models", headers={"Authorization": header}).status_code == 401
        for key in ("first-key", "second-key", "admin-key"):
            assert served.client.get("/v1/models", headers={"Authorization": f"bearer  {key}"}).status_code == 200
        assert served.client.get("/v1/models?api_key=first-key").status_code == 401


def test_loading_wants_an_admin_key(world: sg.World) -> None:
    def load(served: sg.Served, key: str) -> int:
        body = {"name": "tweets"}
        return served.client.post("/v1/load_soft_prompt", json=body, headers=bearer(key)).status_code

    with world.server(**WITH_KEYS) as served:
        assert load(served, "first-key") == 403
        assert load(served, "admin-key") == 200
        unload = served.client.post("/v1/unload_soft_prompt", json={"name": "tweets"}, headers=bearer("first-key"))
        assert refusal(unload, 403)["code"] == "admin_key_needed"
    with world.server(api_keys=("first-key",)) as served:
        assert load(served, "first-key") == 403


def test_tenants_share_no_cache(world: sg.World) -> None:
    body = {**TEXT, "prompt": "nobody shares this long text with anybody else " * 3, "max_tokens": 5}
    with world.server(**WITH_KEYS) as served:

        def cached(key: str) -> int:
            usage = served.client.post(COMPLETIONS, json=body, headers=bearer(key)).json()["usage"]
            found: int = usage["prompt_tokens_details"]["cached_tokens"]
            return found

        assert cached("first-key") == 0
        assert cached("first-key") > 0
        assert cached("second-key") == 0


def test_keys_are_told_apart_by_admin_and_salt() -> None:
    keys = Keys(["a", "b"], ["b", "c"])
    found = [keys.caller(f"Bearer {k}") for k in "abc"]
    assert [c and c.admin for c in found] == [False, True, True]
    assert len({c.salt for c in found if c}) == len({c.fingerprint for c in found if c}) == 3
    assert keys.caller("Bearer d") is None


def test_keys_come_from_the_environment_too() -> None:
    environ = {"FOREWORD_API_KEYS": "one, two,", "FOREWORD_ADMIN_KEYS": "three"}
    found = with_environment(ServeSettings(api_keys=("zero",)), environ)
    assert found.api_keys == ("zero", "one", "two") and found.admin_keys == ("three",) and not found.open
    assert with_environment(ServeSettings(), {}).open


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "--model"), ({"model": "m", "host": "0.0.0.0"}, "without keys"), ({"model": "m", "host": "::"}, "without"),
        ({"model": "m", "api_keys": ("a b",)}, "a key"), ({"model": "m", "admin_keys": ("",)}, "a key"),
        ({"model": "m", "engine": "transfomers"}, "transformers"), ({"model": "m", "vllm_url": "u"}, "--engine vllm"),
        ({"model": "m", "engine": "vllm", "vllm_url": "u", "vllm_python": "p"}, "one of them"),
    ],
)  # fmt: skip
def test_settings_that_contradict_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ForewordError, match=said):
        check_settings(ServeSettings(**settings))
    assert check_settings(ServeSettings(model="m", host="0.0.0.0", api_keys=("k",)))


# --- other sites' pages, in a browser on this machine ---------------------------------------------


def test_without_keys_other_names_and_origins_are_refused(world: sg.World) -> None:
    with world.server() as served:
        own = served.address.removeprefix("http://")
        port = own.partition(":")[2]
        for host in (own, f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LOCALHOST"):
            assert served.client.get("/v1/models", headers={"Host": host}).status_code == 200
        names = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.1@evil.example")
        for host in (*names, f"evil.example:{port}", "", "[::1", "10.0.0.1", "0.0.0.0"):
            assert served.client.get("/v1/models", headers={"Host": host}).status_code in (400, 403), host
            assert served.client.get("/", headers={"Host": host}).status_code in (400, 403)
        assert served.client.get("/v1/models", headers={"Origin": served.address}).status_code == 200
        for origin in (
            "http://evil.example",
            "null",
            "https://" + own,
            f"http://localhost:{port}",
            "http://127.0.0.1:1",
        ):
            answer = served.client.post(COMPLETIONS, json=TEXT, headers={"Origin": origin})
            assert refusal(answer, 403)["code"] == "foreign_origin"
        assert not [h for h in served.client.get("/v1/models").headers if h.startswith("access-control")]


def test_loopback_is_this_machine_only() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "::", "10.0.0.1", "127.0.0.1.x", "localhost.", "example.com")))


def test_the_page_may_run_its_own_script_only(world: sg.World) -> None:
    with world.server() as served:
        policy = served.client.get("/").headers["content-security-policy"]
        assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy)


# --- how much -------------------------------------------------------------------------------------


def test_large_bodies_are_refused_however_they_come(world: sg.World) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 2**15

    headers = {"Content-Type": "application/json"}
    with world.server(max_body=1) as served:
        assert refusal(served.post(COMPLETIONS, **TEXT, user="x" * 2**20), 413)["code"] == "body_too_large"
        assert served.client.post(COMPLETIONS, content=parts(), headers=headers).status_code == 413
        assert served.post(COMPLETIONS, **TEXT).status_code == 200


def test_a_request_asks_for_so_much_at_most(world: sg.World) -> None:
    with world.server(max_texts=4, max_tokens=20) as served:
        for body in ({"prompt": ["a"] * 5}, {"n": 5}, {"prompt": ["a"] * 2, "n": 3}):
            assert "at most 4" in refusal(served.post(COMPLETIONS, **{**TEXT, **body}), 400)["message"]
        assert refusal(served.post(COMPLETIONS, **TEXT, max_tokens=21), 400)["param"] == "max_tokens"
        assert "at most 4" in refusal(served.post("/v1/classify", model="tweets", input=["a"] * 5), 400)["message"]
        bad = [{"stop": ["a"] * 17}, {"stop": "a" * 257}, {"stop": ""}, {"logprobs": 99}, {"logit_bias": {"-1": 1}}]
        for body in (*bad, {"logit_bias": {"999999": 1}}, {"stop_token_ids": [999999]}):
            refusal(served.post(COMPLETIONS, **TEXT, **body), 400)


def test_a_full_queue_sends_away_and_takes_again(counting: sg.World) -> None:
    with counting.server(max_queue=2) as served:
        endless = {**TEXT, "max_tokens": 10**6, "n": 2, "stream": True}
        with served.client.stream("POST", COMPLETIONS, json=endless) as running:
            lines = running.iter_lines()
            next(lines)
            for path, body in ((COMPLETIONS, TEXT), ("/v1/classify", {"model": "tweets", "input": "x"})):
                answer = served.post(path, **body)
                assert refusal(answer, 503)["code"] == "unavailable"
                assert int(answer.headers["retry-after"]) > 0
            assert counter(served, "foreword:queued") == 2
        until(lambda: served.post(COMPLETIONS, **TEXT).status_code == 200, "the queue is never free again")
        assert "at most 2" in refusal(served.post(COMPLETIONS, **TEXT, n=3), 400)["message"]


# --- clients that go away, or do not listen -------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_the_engine(world: sg.World, stream: bool) -> None:
    with world.server() as served:
        before = aborted(served)
        body = json.dumps({**LONG, "stream": stream, "n": 2}).encode()
        with raw(served, body) as connection:
            until(lambda: len(served.gateway.running) == 2, "it never began")
            until(lambda: world.run(world.engine.stats()).running > 0, "the engine never began")
            connection.shutdown(socket.SHUT_RDWR)
        until(lambda: not served.gateway.running, "it still writes")
        assert aborted(served) == before + 2
        until(lambda: world.run(world.engine.stats()).running == 0, "the engine still runs")


def raw(served: sg.Served, body: bytes, buffer: int = 2**16, missing: int = 0) -> socket.socket:
    """A connection that has sent a request (but ``missing`` bytes of it) and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", int(served.address.rpartition(":")[2])))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(body) + missing}\r\n\r\n".encode() + body)
    return connection


def test_a_client_that_does_not_read_is_given_up(counting: sg.World) -> None:
    with counting.server(stall_seconds=0.5) as served:
        body = json.dumps({**TEXT, "max_tokens": 10**6, "stream": True, "n": 64}).encode()
        served.client.close()
        with raw(served, body, 4096):
            until(lambda: len(served.gateway.running) == 64, "it never began")
            began = time.monotonic()
            until(lambda: not served.gateway.running, "the engine writes for nobody")
            assert time.monotonic() - began < 20
            until(lambda: not served.server.server_state.connections, "the connection is held open")
        assert httpx.post(served.address + COMPLETIONS, json=TEXT).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_is_ended(counting: sg.World, stream: bool) -> None:
    with counting.server(request_seconds=1.0) as served:
        answer = served.post(COMPLETIONS, **TEXT, max_tokens=10**6, stream=stream)
        if stream:
            *_, error, done = [line for line in answer.text.split("\n") if line]
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
            assert done == "data: [DONE]"
        else:
            assert refusal(answer, 504)["code"] == "timeout"
        assert not served.gateway.running


def test_a_body_that_never_comes_is_not_waited_for(world: sg.World) -> None:
    with world.server(request_seconds=0.5) as served, raw(served, b"{", missing=10) as connection:
        connection.settimeout(sg.SOON)
        assert b" 504 " in connection.recv(4096)


# --- an engine that dies --------------------------------------------------------------------------


def test_a_dead_engine_ends_streams_and_comes_back(model_folder: Path, store: Path) -> None:
    engine = RemoteEngine(COUNTING, {"step": 0.01}, limits=Limits(grace=1.0))
    with sg.world(engine, model_folder, store) as world, world.server() as served:
        pid = worker_pid()
        lines: list[str] = []
        with served.client.stream("POST", COMPLETIONS, json={**TEXT, "max_tokens": 4000, "stream": True}) as running:
            for line in running.iter_lines():
                lines += [line] if line else []
                if line and len(lines) == 2:  # once: the empty line behind it would kill again
                    os.kill(pid, signal.SIGKILL)
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
        assert lines[-1] == "data: [DONE]"
        down = served.post(COMPLETIONS, **TEXT)
        assert refusal(down, 503)["code"] == "unavailable" and "retry-after" in down.headers
        assert served.client.get("/health").status_code == 503
        until(lambda: served.client.get("/health").status_code == 200, "it never comes back")
        assert served.post(COMPLETIONS, **TEXT).status_code == 200
        assert counter(served, f'foreword:engine_restarts_total{{model_name="{sg.BASE}"}}') == 1


def worker_pid() -> int:
    [found] = [p.pid for p in psutil.Process().children() if COUNTING[1] in p.cmdline()]
    return found


class Forgetful(CountingEngine):
    """Starts anew between a lease and its first use, once for a text and once for a score."""

    async def start(self) -> Capabilities:
        return replace(await super().start(), fingerprint={})

    def _forget(self, epoch: int) -> None:
        if self.epoch == epoch:
            self.held.clear()
            self.epoch += 1

    async def generate(self, request: Request) -> AsyncIterator[Token]:
        self._forget(0)
        async for token in super().generate(request):
            yield token

    async def score(self, request: ScoreRequest) -> list[float]:
        self._forget(1)
        if request.key not in self.held:
            raise UnknownPrompt(request.key)
        return await super().score(request)


def test_what_the_engine_has_forgotten_is_given_to_it_again(model_folder: Path, tmp_path: Path) -> None:
    parts.soft_prompt(tmp_path / "narrow", width=4, trained_for=None)  # as wide as the counting engine
    engine = Forgetful()
    with sg.world(engine, model_folder, tmp_path) as world, world.server() as served:
        assert served.post(COMPLETIONS, model="narrow", prompt="x", max_tokens=2).status_code == 200
        assert served.post("/v1/classify", model="narrow", input="x").status_code == 200
        assert engine.epoch == 2


# --- what is written down -------------------------------------------------------------------------


def test_every_request_has_an_id_and_a_line(world: sg.World) -> None:
    with world.server(**WITH_KEYS) as served, logged() as lines:
        given = {"X-Request-Id": "my-own.id_1", **bearer("first-key")}
        answer = served.client.post(COMPLETIONS, json={**TEXT, "model": "tweets", "max_tokens": 3}, headers=given)
        unfit = [{"X-Request-Id": bad} for bad in ("a b", "x" * 129, "a/b", "")]
        answers = [
            answer,
            *(served.client.get("/health", headers=headers) for headers in unfit),
            served.client.post(COMPLETIONS, json=TEXT, headers=bearer("wrong-key")),
            served.client.get("/v1/nothing-secret", headers=bearer("first-key")),
        ]
        given_id, *made = [a.headers["x-request-id"] for a in answers]
        until(lambda: all(i in "".join(lines) for i in (given_id, *made)), "there are fewer lines than requests")
    assert given_id == "my-own.id_1" and all(re.fullmatch("[0-9a-f]{32}", i) for i in made)
    line_of = {line["request"]: line for line in map(json.loads, lines)}
    assert len(line_of) == len(lines), "one line each"
    first, usage = line_of[given_id], answer.json()["usage"]
    assert first["path"] == COMPLETIONS and first["status"] == 200
    assert first["model"] == "tweets" and first["prompt_tokens"] == usage["prompt_tokens"] and first["ms"] > 0
    assert first["completion_tokens"] == usage["completion_tokens"]
    assert re.fullmatch("[0-9a-f]{8}", first["key"])
    assert [line_of[i]["status"] for i in made] == [200] * 4 + [401, 404]
    for secret in ("first-key", "wrong-key", "parcel"):
        assert secret not in "".join(lines)


@contextmanager
def logged() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("foreword.serving.requests")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield found
    log.removeHandler(handler)


def test_metrics_have_vllms_names_and_ours(world: sg.World) -> None:
    with world.server() as served:
        served.post(COMPLETIONS, model="tweets", prompt="x", max_tokens=3, ignore_eos=True)
        served.post(COMPLETIONS, model="never-there", prompt="x")
        served.post("/v1/classify", model="tweets", input=["x", "y"])
        served.client.get("/v1/models/tweets")
        served.client.get("/no/such/path")
        page = served.client.get("/metrics").text
        names = "num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total " \
            "prefix_cache_hits_total time_to_first_token_seconds_bucket prompt_tokens_total " \
            "inter_token_latency_seconds_bucket e2e_request_latency_seconds_bucket"  # fmt: skip
        for name in names.split():
            assert f"vllm:{name}{{" in page
        assert counter(served, f'vllm:generation_tokens_total{{model_name="{sg.BASE}"}}') == 3
        assert counter(served, 'foreword:generation_tokens_total{soft_prompt="tweets"}') == 3
        assert counter(served, 'foreword:classified_total{soft_prompt="tweets"}') == 2
        assert counter(served, 'foreword:http_requests_total{path="/v1/models/{id}",status="200"}') == 1
        assert counter(served, 'foreword:http_requests_total{path="other",status="404"}') == 1
        assert "never-there" not in page and "/no/such/path" not in page


def test_labels_are_bounded() -> None:
    metrics = Metrics("base")
    for i in range(300):
        metrics.classified(f"prompt-{i}", 1, 0)
    page = metrics.page(Stats(), Usage(0, 0, 0, 0, 0)).decode()
    labels = set(re.findall(r'classified_total{soft_prompt="([^"]+)"}', page))
    assert len(labels) == 101 and "prompt-0" in labels and "prompt-299" not in labels
    assert 'classified_total{soft_prompt="other"} 200.0' in page
