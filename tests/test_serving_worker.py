"""An engine in a process of its own: nothing is lost, mixed up or left behind, and nothing hangs."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from foreword.errors import ForewordError
from foreword.serving import remote, wire, worker
from foreword.serving.engine import (
    Capabilities,
    Decoding,
    EngineDown,
    EngineError,
    EngineRefused,
    Request,
    Rows,
    ScoreRequest,
    Stats,
    Token,
    UnknownPrompt,
)
from foreword.serving.remote import Limits, RemoteEngine, worker_command

SCRIPT = str(Path(__file__).parent / "counting_engine.py")
COUNTING = [sys.executable, SCRIPT]
OPEN = Path("/proc/self/fd")
SOON = 60.0
"""Seconds after which a test gives up waiting."""


def within_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test's coroutine; nothing may hang, and nothing may stay open."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        before = len(list(OPEN.iterdir()))

        async def limited() -> None:
            await asyncio.wait_for(test(*args, **kwargs), 2 * SOON)

        asyncio.run(limited())
        assert len(list(OPEN.iterdir())) <= before
        assert not [p for p in psutil.Process().children(recursive=True) if SCRIPT in p.cmdline()]

    return run


@asynccontextmanager
async def counting(limits: Limits | None = None, **config: Any) -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine(COUNTING, config, limits=limits)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def request(name: str, *ids: int, n: int = 5, key: str | None = None) -> Request:
    return Request(name, ids or (1, 2, 3), key, Decoding(max_tokens=n))


async def text(engine: RemoteEngine, asked: Request) -> list[Token]:
    return [t async for t in engine.generate(asked)]


async def until(true: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    deadline = time.monotonic() + SOON
    while not await true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def back_again(engine: RemoteEngine, epoch: int) -> None:
    async def risen() -> bool:
        return engine.alive and engine.epoch >= epoch

    await until(risen)


# --- what travels --------------------------------------------------------------------------------

finite = st.floats(allow_nan=False, allow_infinity=False)
anything = st.floats(allow_nan=False)
ids = st.lists(st.integers(0, 2**31), min_size=1).map(tuple)
names = st.text(max_size=20)
decodings = st.builds(
    Decoding,
    max_tokens=st.integers(1, 10**6),
    temperature=finite,
    top_p=finite,
    logit_bias=st.dictionaries(st.integers(0, 10**6), finite),
    seed=st.none() | st.integers(),
    stop_ids=ids | st.just(()),
    ignore_eos=st.booleans(),
    top_logprobs=st.none() | st.integers(0, 20),
)
tops = st.lists(st.tuples(st.integers(0), anything)).map(tuple)
tokens = st.builds(
    Token,
    st.integers(-1),
    st.none() | anything,
    tops,
    st.sampled_from([None, "stop", "length", "abort"]),
    st.integers(0),
)
capabilities = st.builds(
    Capabilities,
    *[names, names, *[st.integers()] * 4, names],
    kinds=st.lists(names).map(tuple),
    samples=st.lists(names).map(tuple),
    fingerprint=st.dictionaries(names, names | st.integers() | st.none()),
    prefix_width=st.integers(),
)


def sent(packed: Any) -> Any:
    """What arrives at the other end: one line, whatever is in it."""
    line = wire.line({"body": packed})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    return wire.parse(line)["body"]


@given(st.builds(Request, names, ids, st.none() | names, decodings, names))
def test_requests_arrive_as_sent(value: Request) -> None:
    assert wire.unpack_request(sent(wire.pack_request(value))) == value


@given(st.builds(ScoreRequest, names, ids, st.lists(ids).map(tuple), st.none() | names, names))
def test_score_requests_arrive_as_sent(value: ScoreRequest) -> None:
    assert wire.unpack_score(sent(wire.pack_score(value))) == value


@given(tokens, capabilities, st.builds(Stats, *[st.integers()] * 4, finite, st.integers(), st.integers()))
def test_answers_arrive_as_sent(token: Token, found: Capabilities, stats: Stats) -> None:
    assert wire.unpack_token(sent(wire.pack_token(token))) == token
    assert wire.unpack_capabilities(sent(wire.pack_capabilities(found))) == found
    assert wire.unpack_stats(sent(wire.pack_stats(stats))) == stats


@given(names, st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1), st.booleans())
def test_rows_arrive_bit_for_bit(key: str, values: list[list[float]], prefix: bool) -> None:
    rows = Rows(key, np.array(values, np.float32), "prefix" if prefix else "rows")
    found = wire.unpack_rows(sent(wire.pack_rows(rows)))
    assert (found.key, found.kind, found.values.shape) == (rows.key, rows.kind, rows.values.shape)
    assert found.values.tobytes() == rows.values.tobytes()


@given(st.sampled_from([EngineError, EngineDown, EngineRefused, UnknownPrompt]), st.lists(names))
def test_errors_arrive_as_what_they_are(kind: type[Exception], args: list[str]) -> None:
    found = worker.unpack_error(sent(worker.pack_error(kind(*args))))
    assert type(found) is kind
    assert found.args == tuple(args)


# --- an engine behind it --------------------------------------------------------------------------


@within_time
async def test_two_hundred_texts_at_once_each_in_order() -> None:
    async with counting() as engine:
        asked = [request(str(i), i, i + 1, n=20) for i in range(200)]
        for r, found in zip(asked, await asyncio.gather(*(text(engine, r) for r in asked)), strict=True):
            assert [t.id for t in found] == [r.ids[i % 2] for i in range(20)]
            assert [t.cached for t in found] == list(range(20))
            assert [t.finish for t in found] == [None] * 19 + ["length"]


@within_time
async def test_prompts_scores_and_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    async with counting() as engine:
        with pytest.raises(UnknownPrompt):
            await text(engine, request("early", key="a"))
        await engine.put(Rows("a", np.ones((2, 4), np.float32)))
        assert (await engine.stats()).prompt_bytes == 32
        assert len(await text(engine, request("late", key="a"))) == 5
        assert await engine.score(ScoreRequest("s", (1,), ((1, 2), (4,)))) == [3.0, 4.0]
        await engine.drop("a")
        assert await engine.stats() == Stats()
        monkeypatch.setattr(wire, "LINE_LIMIT", 1000)
        with pytest.raises(EngineRefused, match="more than an engine takes"):
            await engine.put(Rows("b", np.ones((100, 4), np.float32)))


@within_time
async def test_errors_keep_their_class_and_harm_nobody_else() -> None:
    async with counting(step=0.01) as engine:
        other = asyncio.create_task(text(engine, request("other", n=20)))
        with pytest.raises(EngineRefused, match="by far"):
            await text(engine, request("refused"))
        with pytest.raises(EngineError, match="ZeroDivisionError: of the model"):
            await engine.score(ScoreRequest("broken", (1,), ((1,),)))
        with pytest.raises(EngineDown, match="gave this up"):
            await engine.score(ScoreRequest("cancelled", (1,), ((1,),)))
        with pytest.raises(EngineError, match="without an end"):
            await text(engine, request("endless"))
        assert len(await other) == 20


@within_time
async def test_what_an_engine_prints_is_not_taken_for_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    async with counting() as engine:
        assert len(await text(engine, request("loud"))) == 5
    assert '[1,"value",1]' in capsys.readouterr().err


@within_time
async def test_leaving_a_text_ends_it_on_the_worker() -> None:
    async with counting(step=0.01) as engine:

        async def quiet() -> bool:
            return (await engine.stats()).running == 0

        left = engine.generate(request("left", n=10**6))
        await anext(left)
        assert not await quiet()
        await left.aclose()
        await until(quiet)
        aborted = engine.generate(request("aborted", n=10**6))
        await anext(aborted)
        await engine.abort("aborted")
        assert [t async for t in aborted][-1].finish == "abort"
        scoring = asyncio.create_task(engine.score(ScoreRequest("s", (1,), ((1,),))))
        await asyncio.sleep(0)
        scoring.cancel()
        await until(quiet)


@within_time
async def test_a_slow_reader_holds_no_more_than_the_backlog() -> None:
    async with counting(Limits(backlog=50)) as engine:
        slow = engine.generate(request("slow", n=10**6))
        await anext(slow)

        async def ended() -> bool:
            return (await engine.stats()).running == 0

        await until(ended)
        rest = [t async for t in slow]
        assert len(rest) <= 51
        assert rest[-1].finish == "abort"


# --- a worker that fails --------------------------------------------------------------------------


@within_time
async def test_a_killed_worker_ends_all_at_once_and_comes_back() -> None:
    engine = RemoteEngine(COUNTING, {"step": 0.01})
    pid = (await engine.start()).fingerprint["pid"]
    await engine.put(Rows("a", np.ones((1, 4), np.float32)))
    running = [engine.generate(request(str(i), n=10**6)) for i in range(3)]
    for r in running:
        await anext(r)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    for r in running:
        with pytest.raises(EngineDown):
            [t async for t in r]
    assert not engine.alive
    for refused in (text(engine, request("new")), engine.score(ScoreRequest("s", (1,), ((1,),))), engine.put):
        with pytest.raises(EngineDown):
            await (refused if asyncio.iscoroutine(refused) else refused(Rows("b", np.ones((1, 4), np.float32))))
    await engine.drop("a")
    assert time.monotonic() - began < SOON / 10
    await back_again(engine, 2)
    with pytest.raises(UnknownPrompt):
        await text(engine, request("old", key="a"))
    assert len(await text(engine, request("new"))) == 5
    assert (await engine.stats()).restarts == 1
    await engine.close()
    await engine.close()
    assert not engine.alive


@pytest.mark.parametrize(("how", "answer"), [("exit", 60.0), ("hang", 2.0), ("dead", 60.0)])
@within_time
async def test_a_worker_that_ends_hangs_or_lost_its_engine_is_started_again(how: str, answer: float) -> None:
    async with counting(Limits(beat=0.1, answer=answer), step=0.01) as engine:
        other = asyncio.create_task(text(engine, request("other", n=10**6)))
        await asyncio.sleep(0.1)
        with pytest.raises(EngineDown):
            await text(engine, request(how))
        with pytest.raises(EngineDown):
            await other
        await back_again(engine, 2)
        assert len(await text(engine, request("new"))) == 5


@within_time
async def test_a_worker_that_does_not_load_again_is_tried_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(remote, "LONGEST_DELAY", 0.15)
    weights = tmp_path / "weights"
    weights.touch()

    async def tried_thrice() -> bool:
        return [m for m in caplog.messages if "next try" in m][2:3] != []

    async with counting(needs=str(weights)) as engine:
        weights.unlink()
        with pytest.raises(EngineDown):
            await text(engine, request("exit"))
        await until(tried_thrice)
        assert not engine.alive
        assert engine.epoch == 1
        weights.touch()
        await back_again(engine, 2)
    waits = [m.split("next try in ")[1].split()[0] for m in caplog.messages if "next try" in m]
    assert waits[:3] == ["0.1", "0.15", "0.15"]


@within_time
async def test_a_worker_that_does_not_load_says_why() -> None:
    with pytest.raises(ForewordError, match="no such model") as found:
        await RemoteEngine(COUNTING, {"fault": "foreword"}).start()
    assert found.value.fix == "give another"
    with pytest.raises(ForewordError, match="status 3") as found:
        await RemoteEngine(COUNTING, {"fault": "exit"}).start()
    assert "out of memory | that was all" in found.value.where
    with pytest.raises(ForewordError, match="not ready within 1 s"):
        await RemoteEngine(COUNTING, {"fault": "slow"}, limits=Limits(start=1.0)).start()
    with pytest.raises(ForewordError, match="TypeError"):
        await RemoteEngine(COUNTING, {"unknown": 1}).start()
    with pytest.raises(ForewordError, match="cannot be started"):
        await RemoteEngine(["/no/such/python"], {}).start()
    command, env = worker_command("nothing", sys.executable)
    with pytest.raises(ForewordError, match=r"No module named 'foreword\.serving\.engines\.nothing'"):
        await RemoteEngine(command, {}, env).start()


# --- the end --------------------------------------------------------------------------------------


@within_time
async def test_closing_lets_texts_end_then_aborts_them(capsys: pytest.CaptureFixture[str]) -> None:
    async with counting(Limits(grace=1.0), step=0.01) as engine:
        short = asyncio.create_task(text(engine, request("short", n=10)))
        long = asyncio.create_task(text(engine, request("long", n=10**6)))
        await asyncio.sleep(0.1)
    assert [t.finish for t in await short][-1] == "length"
    assert [t.finish for t in await long][-1] == "abort"
    with pytest.raises(EngineDown):
        await text(engine, request("new"))
    assert "closed in peace" in capsys.readouterr().err


@within_time
async def test_closing_ends_a_worker_that_hangs() -> None:
    async with counting(Limits(grace=0.1)) as engine:
        hung = asyncio.create_task(text(engine, request("hang")))
        await asyncio.sleep(0.1)
    assert [t.finish for t in await hung] == ["abort"]


GATEWAY = """
import asyncio, sys
from foreword.serving.engine import Decoding, Request
from foreword.serving.remote import RemoteEngine

async def main():
    engine = RemoteEngine([sys.executable, sys.argv[1]], {"child": True, "fault": sys.argv[2]})
    starting = asyncio.create_task(engine.start())
    if not sys.argv[2]:
        await starting
        await anext(engine.generate(Request("x", (1,), None, Decoding(max_tokens=10**6))))
        asyncio.create_task(anext(engine.generate(Request(sys.argv[3], (1,)))))
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_no_process_outlives_a_killed_gateway() -> None:
    cases = [("slow", ""), ("", "x"), ("", "hang")]
    gateways = [subprocess.Popen([sys.executable, "-c", GATEWAY, SCRIPT, *case]) for case in cases]
    deadline = time.monotonic() + SOON
    for gateway, (fault, _) in zip(gateways, cases, strict=True):
        while len(psutil.Process(gateway.pid).children(recursive=True)) < 1 + (fault == ""):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    time.sleep(0.5)  # until all are in the middle of what they do
    left = [p for g in gateways for p in psutil.Process(g.pid).children(recursive=True)]
    assert len(left) == 5
    for gateway in gateways:
        gateway.kill()
        gateway.wait()
    _, alive = psutil.wait_procs(left, SOON / 4)
    assert not alive


@contextmanager
def bare_worker() -> Iterator[tuple[socket.socket, Callable[[], list[Any]]]]:
    """A worker, and the gateway's end of its connection."""
    ours, theirs = socket.socketpair()
    fd = str(theirs.fileno())
    process = subprocess.Popen([*COUNTING, fd], pass_fds=(theirs.fileno(),), start_new_session=True, stderr=-1)
    theirs.close()
    ours.settimeout(SOON)
    with ours, ours.makefile("rb") as lines, process:
        yield ours, lambda: wire.parse(lines.readline())["events"]
        ours.shutdown(socket.SHUT_RDWR)
        assert process.wait(SOON) == -signal.SIGKILL


def test_lines_that_make_no_sense_are_passed_over() -> None:
    with bare_worker() as (ours, events):
        for line in (
            b"\xff\xfe\n",
            b"[" * 10**5 + b"\n",
            b"[]\n",
            b"{}\n",
            b'{"call":"x","op":"stats"}\n',
            b"\n",
            b"7\n",
        ):
            ours.sendall(line)
        ours.sendall(wire.line({"call": 1, "op": "stats"}))
        assert events() == [[1, "error", ["EngineDown", ["the engine is not running"]]]]
        ours.sendall(wire.line({"call": 2, "op": "start", "body": {}}))
        assert events()[0][:2] == [2, "value"]
        for n, message in enumerate([{"op": "fly"}, {"op": "generate", "body": {"id": 1}}, {"op": "put", "body": []}]):
            ours.sendall(wire.line({"call": n + 3, **message}))
            assert events()[0][:2] == [n + 3, "error"]
        ours.sendall(wire.line({"call": 99, "op": "abort"}) + wire.line({"call": 9, "op": "ping"}))
        assert events() == [[9, "value", None]]
        ours.sendall(b'{"call": 10, "op": "pi')  # and the gateway dies


def test_what_is_ready_together_travels_in_one_line() -> None:
    with bare_worker() as (ours, events):
        ours.sendall(wire.line({"call": 0, "op": "start", "body": {}}))
        events()
        asked = [{"call": n, "op": "generate", "body": wire.pack_request(request(str(n), n=3))} for n in range(1, 9)]
        ours.sendall(b"".join(map(wire.line, asked)))
        found = [events() for _ in range(3)]
        assert [[e[0] for e in line] for line in found] == [list(range(1, 9))] * 3


# --- a real model behind it -----------------------------------------------------------------------


def greedy(model: torch.nn.Module, context: tuple[int, ...], rows: torch.Tensor, n: int) -> list[int]:
    """Token by token, each by a plain forward over embeddings."""
    found: list[int] = []
    for _ in range(n):
        embedded = model.get_input_embeddings()(torch.tensor([[*context, *found]]))
        logits = model(inputs_embeds=torch.cat([rows[None], embedded], 1)).logits
        found.append(int(logits[0, -1].argmax()))
    return found


def test_a_real_engine_killed_in_the_middle_serves_again(model_folder: Path) -> None:
    model = tiny.backbone(dtype=torch.float32).model
    rows = torch.randn(4, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    decoding = Decoding(max_tokens=6, ignore_eos=True)
    asked = Request("a", (*range(tiny.VOCAB, tiny.VOCAB + 4), 5, 6, 7), "k", decoding)
    with torch.no_grad():
        expected = greedy(model, (5, 6, 7), rows, 6)
        plain = greedy(model, (5, 6, 7), rows[:0], 6)

    @within_time
    async def serve() -> None:
        command, env = worker_command("transformers")
        engine = RemoteEngine(command, {"model": str(model_folder), "kv_memory": 8.0, "prompt_memory": 1.0}, env)
        assert (await engine.start()).vocab_size == tiny.VOCAB
        for epoch in (1, 2):
            await engine.put(Rows("k", rows.numpy()))
            both = await asyncio.gather(text(engine, asked), text(engine, Request("b", (5, 6, 7), None, decoding)))
            assert [[t.id for t in found] for found in both] == [expected, plain]
            if epoch == 1:
                running = engine.generate(Request("c", (5, 6), None, Decoding(max_tokens=400, ignore_eos=True)))
                await anext(running)
                [process] = [p for p in psutil.Process().children() if "foreword.serving.worker" in p.cmdline()]
                process.kill()
                with pytest.raises(EngineDown):
                    [t async for t in running]
                await back_again(engine, 2)
        await engine.close()

    serve()
