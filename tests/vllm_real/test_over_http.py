"""A vLLM server that somebody else started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import vllm_checks
from vllm_served import KEY, Served, served_by, server

import serving_checks as checks
import tiny_vllm
import vllm_scenario
from foreword.backbone.load import Backbone
from foreword.errors import ForewordError
from foreword.serving.engine import Engine, EngineDown, EngineRefused, ScoreRequest
from foreword.serving.engines.vllm_http import VllmHttpConfig, VllmHttpEngine

Check = Callable[[Engine, checks.Reference], Awaitable[None]]
ALL: list[Check] = [
    checks.check_mixed_batch,
    checks.check_same_text_other_prompt,
    checks.check_scores,
    checks.check_logprobs,
    checks.check_abort,
    checks.check_reload,
    checks.check_seeds,
    checks.check_refusals,
    vllm_checks.check_scores_beside_alternatives,
    vllm_checks.check_one_question,
    vllm_checks.check_whole_blocks_are_shared,
    vllm_checks.check_ends,
]
Address = tuple[str, "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def address(vllm_python: str, folder: Path) -> Iterator[Address]:
    with server(vllm_python, folder) as found:
        yield found


@pytest.fixture(scope="module")
def served(address: Address, folder: Path, backbone: Backbone) -> Iterator[Served]:
    config = VllmHttpConfig(address[0], str(folder), api_key=KEY, beat=1.0)
    with served_by(VllmHttpEngine(config), backbone) as found:
        yield found


@pytest.mark.parametrize("check", ALL, ids=lambda c: c.__name__.removeprefix("check_"))
def test_conformance(served: Served, check: Check) -> None:
    served.run(check(served.engine, served.reference))


def test_salts_share_nothing(served: Served) -> None:
    """The count comes with the last token."""

    async def cached(salt: str) -> int:
        case = checks.Case(tuple(range(30, 110)))
        answer = await checks.collect(served.engine.generate(checks.request(case, salt, max_tokens=2)))
        return sum(t.cached for t in answer)

    async def go() -> list[int]:
        return [await cached(salt) for salt in ("one", "one", "two")]

    first, again, other = served.run(go())
    assert (first, other) == (0, 0)
    assert again > 0


def test_the_record_still_holds(served: Served) -> None:
    """What the doubles of the other tests say is what vLLM says."""
    vllm_checks.same_answers(served.run(vllm_scenario.play(served.engine)), "vllm_http")


def test_capabilities(served: Served) -> None:
    c, backbone = served.capabilities, served.reference.backbone
    assert c.fingerprint == backbone.fingerprint.as_dict()
    assert (c.vocab_size, c.hidden_size, c.window) == (backbone.vocab_size, backbone.hidden_size, backbone.window)
    assert (c.end_id, c.dtype, c.kinds) == (backbone.end_id, "float32", ("rows",))


def test_a_penalty_that_the_server_cannot_count_is_refused(served: Served) -> None:
    case = checks.Case((*checks.virtual(served.reference, "s0"), 5), "s0")
    with pytest.raises(EngineRefused, match="repetition_penalty"):
        served.run(checks.collect(served.engine.generate(checks.request(case, repetition_penalty=1.2))))


def test_another_key_and_another_model_are_noticed_at_the_start(address: Address, folder: Path, tmp_path: Path) -> None:
    other = tiny_vllm.save(tmp_path / "other", seed=1)
    for model, key, said in ((folder, "wrong", "key"), (other, KEY, "answers otherwise")):
        with pytest.raises(ForewordError, match=said):
            asyncio.run(VllmHttpEngine(VllmHttpConfig(address[0], str(model), api_key=key)).start())


def test_when_the_server_stops_answering_requests_end(served: Served, address: Address) -> None:
    """Last of all: the server is stopped, goes on, and is killed."""
    engine, reference = served.engine, served.reference
    case = checks.cases_of(reference, 1)[0]

    async def go() -> None:
        stream = engine.generate(checks.request(case, max_tokens=400, ignore_eos=True))
        await anext(stream)
        os.killpg(address[1].pid, signal.SIGSTOP)
        try:
            with pytest.raises(EngineDown):
                await engine.score(ScoreRequest("stopped", case.ids, ((5,),), case.key))
            with pytest.raises(EngineDown):
                await checks.collect(stream)
            assert not engine.alive
        finally:
            os.killpg(address[1].pid, signal.SIGCONT)
        async with asyncio.timeout(60):
            while not engine.alive:
                await asyncio.sleep(0.1)
        answer = await checks.collect(engine.generate(checks.request(case, max_tokens=5)))
        assert checks.ids_of(answer) == reference.text(case, 5)
        os.killpg(address[1].pid, signal.SIGKILL)
        with pytest.raises(EngineDown):
            await checks.collect(engine.generate(checks.request(case, max_tokens=5)))

    served.run(go())
