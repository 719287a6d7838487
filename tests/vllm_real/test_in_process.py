"""vLLM in a worker of its own environment, behind the gateway's transport."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import vllm_checks
from vllm_served import STARTING, Served, served_by

import serving_checks as checks
import vllm_scenario
from foreword.backbone.load import Backbone
from foreword.serving.engine import Engine, EngineDown
from foreword.serving.engines.model_files import describe, open_files
from foreword.serving.remote import Limits, RemoteEngine, worker_command

Check = Callable[[Engine, checks.Reference], Awaitable[None]]
ALL: list[Check] = [
    checks.check_mixed_batch,
    checks.check_same_text_other_prompt,
    checks.check_salts_share_nothing,
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
    vllm_checks.check_repetition_counts_the_text_alone,
]


@pytest.fixture(scope="module")
def served(vllm_python: str, folder: Path, backbone: Backbone) -> Iterator[Served]:
    command, env = worker_command("vllm", vllm_python)
    settings = {**describe(open_files(str(folder))), "kv_memory": 32, "threads": 1}
    with served_by(RemoteEngine(command, settings, env, Limits(start=STARTING, grace=5)), backbone) as found:
        yield found


@pytest.mark.parametrize("check", ALL, ids=lambda c: c.__name__.removeprefix("check_"))
def test_conformance(served: Served, check: Check) -> None:
    served.run(check(served.engine, served.reference))


def test_the_record_still_holds(served: Served) -> None:
    """What the doubles of the other tests say is what vLLM says."""
    vllm_checks.same_answers(served.run(vllm_scenario.play(served.engine)), "vllm_in_process")


def test_capabilities(served: Served) -> None:
    c, backbone = served.capabilities, served.reference.backbone
    assert c.fingerprint == backbone.fingerprint.as_dict()
    assert (c.vocab_size, c.hidden_size, c.window) == (backbone.vocab_size, backbone.hidden_size, backbone.window)
    assert (c.end_id, c.dtype, c.kinds) == (backbone.end_id, "float32", ("rows",))


def test_when_a_process_of_vllms_dies_requests_end_and_it_is_started_again(served: Served) -> None:
    engine, reference = served.engine, served.reference
    case = checks.cases_of(reference, 1)[0]

    async def go() -> None:
        core = _core().pid  # looked for beforehand: all tokens may come while processes are listed
        stream = engine.generate(checks.request(case, max_tokens=400, ignore_eos=True))
        await anext(stream)
        os.kill(core, signal.SIGKILL)
        with pytest.raises(EngineDown):
            await checks.collect(stream)
        epoch = engine.epoch
        async with asyncio.timeout(STARTING):
            while not engine.alive or engine.epoch == epoch:
                await asyncio.sleep(0.2)
        answer = await checks.collect(engine.generate(checks.request(case, max_tokens=5)))
        assert checks.ids_of(answer) == reference.text(case, 5)

    served.runner.run(go())


def _core() -> psutil.Process:
    """The process that schedules, below the worker."""
    children = psutil.Process().children(recursive=True)
    return next(p for p in children if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline()))
