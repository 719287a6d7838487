"""What both vLLM engines must do beyond what every engine must."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import serving_checks as checks
from foreword.serving.engine import Engine, ScoreRequest


async def check_scores_beside_alternatives(engine: Engine, reference: checks.Reference) -> None:
    """Texts that list alternatives and scores at the same time: neither spoils the other."""
    cases = checks.cases_of(reference, 12, seed=9)
    wanted = {"max_tokens": 12, "top_logprobs": 3, "ignore_eos": True}
    alone = [await checks.collect(engine.generate(checks.request(c, **wanted))) for c in cases[:4]]
    branches = ((5, 7, 0), (5, 8), (9,))

    async def scores(start: float) -> None:
        for i, case in enumerate(cases[4:]):
            await asyncio.sleep(start)
            found = await engine.score(ScoreRequest(f"beside-{start}-{i}", case.ids, branches, case.key))
            assert found == pytest.approx(reference.scores(case, branches), abs=1e-4)

    texts = [checks.collect(engine.generate(checks.request(c, **wanted))) for c in cases[:4]]
    together, *_ = await asyncio.gather(asyncio.gather(*texts), scores(0.0), scores(0.01))
    for once, again in zip(alone, together, strict=True):
        assert [t.id for t in once] == [t.id for t in again]
        for a, b in zip(once, again, strict=True):
            assert [i for i, _ in a.top] == [i for i, _ in b.top]
            assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-4)


async def check_one_question(engine: Engine, reference: checks.Reference) -> None:
    """Label words of one token each cost one request: one context's worth of tokens looked up."""
    case = checks.Case((*checks.virtual(reference, "s2"), *range(20, 34)), "s2")
    before = (await engine.stats()).prefix_queries
    await engine.score(ScoreRequest("one", case.ids, ((5,), (6,), (9,), (11,)), case.key))
    assert await _queries(engine, before + len(case.ids)) == before + len(case.ids)


async def _queries(engine: Engine, wanted: int) -> int:
    """The counter, which is brought up to date a moment after the answer."""
    for _ in range(100):
        if (found := (await engine.stats()).prefix_queries) >= wanted:
            break
        await asyncio.sleep(0.02)
    return found


async def check_whole_blocks_are_shared(engine: Engine, reference: checks.Reference) -> None:
    """Rows that fill a block are computed once for all texts behind them."""
    for key, shared in (("s2", 32), ("s4", 32), ("s0", 0)):
        texts = [tuple(range(start, start + 9)) for start in (100, 120)]
        cases = [checks.Case((*checks.virtual(reference, key), *text), key) for text in texts]
        for case in cases:
            answer = await checks.collect(engine.generate(checks.request(case, "shared", max_tokens=3)))
        assert sum(t.cached for t in answer) == shared


async def check_ends(engine: Engine, reference: checks.Reference) -> None:
    """The end token is never delivered, a stop id is; one that is asked for as a stop id is delivered too."""
    end = reference.backbone.end_id
    case = checks.cases_of(reference, 2)[1]
    forced = {"logit_bias": {end: 100.0}, "max_tokens": 5}
    (only,) = await checks.collect(engine.generate(checks.request(case, **forced)))
    assert (only.id, only.finish) == (-1, "stop")
    (only,) = await checks.collect(engine.generate(checks.request(case, **forced, stop_ids=(end,))))
    assert (only.id, only.finish) == (end, "stop")
    on = await checks.collect(engine.generate(checks.request(case, **forced, ignore_eos=True)))
    assert [t.id for t in on] == [end] * 5
    text = reference.text(case, 5)
    stopped = await checks.collect(engine.generate(checks.request(case, max_tokens=5, stop_ids=(text[2],))))
    assert [t.id for t in stopped] == text[: text.index(text[2]) + 1]
    assert stopped[-1].finish == "stop"


async def check_repetition_counts_the_text_alone(engine: Engine, reference: checks.Reference) -> None:
    """Rows bring no token into the penalty: a mixed prompt is penalised like its text."""
    case = checks.Case((*checks.virtual(reference, "s0"), 50, 51, 52), "s0")
    plain = {"max_tokens": 1, "top_logprobs": 20}
    (first,) = await checks.collect(engine.generate(checks.request(case, **plain)))
    penalised = await checks.collect(engine.generate(checks.request(case, repetition_penalty=9.0, **plain)))
    assert penalised[0].id == next(i for i, _ in first.top if i not in (50, 51, 52))
    bias = {"logit_bias": {0: 50.0}}
    (zero,) = await checks.collect(engine.generate(checks.request(case, repetition_penalty=1.5, **bias, **plain)))
    assert zero.id == -1


def same_answers(found: dict[str, Any], record: str) -> None:
    """Holds answers to the scenario against a record: the same tokens, log-probabilities up to rounding."""
    known = json.loads((Path(__file__).parents[1] / "data" / f"{record}.json").read_text())["answers"]
    assert found["refused"] == known["refused"]
    for name, scores in known["scores"].items():
        assert found["scores"][name] == pytest.approx(scores, abs=1e-4), name
    for name, tokens in known["texts"].items():
        assert [(t[0], t[3]) for t in found["texts"][name]] == [(t[0], t[3]) for t in tokens], name
        assert [t[1] for t in found["texts"][name]] == pytest.approx([t[1] for t in tokens], abs=1e-4), name
