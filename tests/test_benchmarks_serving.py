"""The serving benchmark and the soak: their arithmetic, their opponents, and one small run of each."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import results
import serving
import serving_load
import serving_opponents
import serving_ours
import serving_scale
import serving_table
import soak
import soak_truth
from serving_load import Answer, Round
from serving_ours import Ask, Right

TOKENS = 4
SMALL = ["--threads", "1", "--virtual-tokens", "4"]


@pytest.fixture(scope="module")
def setting(model_folder: Path) -> serving_ours.Setting:
    """The bundled texts and the tiny model."""
    return serving_ours.prepare(str(model_folder), "bundled:complaints", "text", "label", 4)


@pytest.fixture(scope="module")
def folder(setting: serving_ours.Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three soft prompts."""
    place = tmp_path_factory.mktemp("prompts")
    serving_ours.write_prompts(setting, place, serving_ours.names(3))
    return place


def answer(*pieces: float, began: float = 0.0, tokens: int = 2) -> Answer:
    return Answer(200, began, pieces[-1], pieces, "text", tokens)


def test_figures_are_medians_of_rounds_and_percentiles_of_answers() -> None:
    rounds = [Round(2.0, [answer(1.0, 2.0, began=0.5), answer(1.0, 1.5)]), Round(4.0, [answer(2.0, 4.0)] * 2)]
    found = serving.figures(rounds, by_token=True)
    assert found["round"]["median_s"] == 3.0
    assert found["tokens_per_s"] == 1.5
    assert found["requests_per_s"] == 0.75
    assert found["first_token_ms"] == {"p50": 2000.0, "p99": 2000.0}
    assert found["between_tokens_ms"] == {"p50": 2000.0, "p99": 2000.0}
    assert "first_token_ms" not in serving.figures(rounds, by_token=False)
    assert serving_load.percentiles([0.001 * i for i in range(1, 101)]) == {"p50": 51.0, "p99": 100.0}


def test_contenders_take_turns_on_texts_of_their_own(setting: serving_ours.Setting) -> None:
    seen: dict[str, list[Ask]] = {"a": [], "b": []}
    order: list[str] = []

    def work(name: str, asks: Any) -> Round:
        seen[name] += asks
        order.append(name)
        return Round(1.0, [answer(1.0)] * len(asks))

    works = {n: lambda asks, n=n: work(n, asks) for n in seen}
    found = serving.take_turns(works, lambda n: setting.asks(n, ["x", "y"]), rounds=2, warm=1, count=3)
    assert order == ["a", "b", "a", "b", "b", "a"]
    texts = [ask.text for asks in seen.values() for ask in asks]
    assert len(set(texts)) == len(texts) == 14
    assert [ask.text[8:] for ask in seen["a"]] == [ask.text[8:] for ask in seen["b"]]
    assert [ask.prompt for ask in found["a"][0]] == ["x", "y", "x"]
    assert len(found["a"][1]) == 2


def test_opponents_answer_as_one_at_a_time_and_in_order(setting: serving_ours.Setting, folder: Path) -> None:
    peft = serving_opponents.Peft(setting, folder, serving_ours.names(3), TOKENS)
    plain = serving_opponents.Plain(setting, TOKENS)
    asks = [Ask(name, text) for text in ("late", "thank you", "reply to me") for name in serving_ours.names(3)]
    for ask in asks[:3]:
        (said,) = peft.complete([ask]).answers
        assert said.text == text_of(setting, ask)
        assert said.tokens == len(said.pieces) == TOKENS
        assert sorted(said.pieces) == list(said.pieces)
    alone = [text_of(setting, Ask(None, ask.text)) for ask in asks]
    assert [a.text for a in plain.complete(asks).answers] == alone
    same_length = [Ask(name, text) for text in ("1", "2", "3") for name in serving_ours.names(3)]
    assert len({len(setting.context(ask)) for ask in same_length}) == 1  # PEFT takes pads for text
    assert [a.text for a in peft.complete(same_length).answers] == [text_of(setting, ask) for ask in same_length]
    longest = max(map(len, setting.encoder(None).label_ids))
    assert all(a.tokens <= longest for a in peft.classify(asks).answers)
    assert serving_opponents.said_label({"yes": "yes it is"}, " yes it is") == "yes"
    assert serving_opponents.said_label({"yes": "yes it is"}, " yes it isn't") is None


def text_of(setting: serving_ours.Setting, ask: Ask) -> str:
    right = serving_ours.right_text(setting, ask, TOKENS)
    assert len(right.ids) == len(right.gaps) == TOKENS
    return str(setting.backbone.tokenizer.decode(right.ids, skip_special_tokens=True))


def test_a_different_text_is_wrong_unless_two_tokens_were_as_likely(setting: serving_ours.Setting) -> None:
    decode = setting.backbone.tokenizer.decode
    ids = tuple(setting.backbone.tokenizer("the quick brown fox")["input_ids"])
    text, other = decode(ids), decode(ids[:2]) + "?"
    sure = Right(ids, (1.0,) * len(ids))
    assert serving_ours.verdict(setting, sure, text) == "equal"
    assert serving_ours.verdict(setting, sure, other) == "wrong"
    assert serving_ours.verdict(setting, sure, text + "!") == "wrong"
    tied = Right(ids, (1.0, 1.0, 1e-5, *(1.0,) * (len(ids) - 3)))
    assert serving_ours.verdict(setting, tied, other) == "tie"
    assert serving_ours.verdict(setting, tied, "?" + text) == "wrong"


def test_soft_prompts_are_what_foreword_and_peft_read(setting: serving_ours.Setting, folder: Path) -> None:
    from foreword.artifact.folder import read_adapter

    for name in serving_ours.names(3):
        adapter = read_adapter(folder / name)
        assert adapter.prompt.values.equal(setting.rows(name))
        assert adapter.sidecar is not None
        assert adapter.sidecar.task == setting.task
    assert not setting.rows("p00000").equal(setting.rows("p00001"))


def test_a_name_may_stand_for_both_contents_during_a_switch_only() -> None:
    name = soak_truth.Name("p", {}, ("p", "p other"), "p")
    with name.watched() as before, name.changing("p other"), name.watched() as during:
        pass
    with name.watched() as after:
        pass
    assert (before, during, after) == ({"p", "p other"}, {"p", "p other"}, {"p other"})
    with name.changing(None), name.watched() as unloading:
        pass
    assert unloading == {"p other", None}


def test_the_soak_knows_wrong_answers() -> None:
    old, new = soak_truth.Expected("old", {"a": 0.25, "b": 0.75}), soak_truth.Expected("new", {"a": 0.5, "b": 0.5})
    right = {"text": {"p": old, "q": new}}
    name, tally = soak_truth.Name("p", right, ("p", "q"), "p"), soak.Tally(0.0)

    def judged(kind: str, found: Answer, *allowed: str | None) -> int:
        soak.judge(tally, kind, name, "text", found, set(allowed))
        return len(tally.wrong)

    labels = {"data": [{"probabilities": {"a": 0.25, "b": 0.75}}]}
    assert judged("text", Answer(200, 0, 1, text="old"), "p") == 0
    assert judged("text", Answer(200, 0, 1, text="new"), "p", "q") == 0
    assert judged("classify", Answer(200, 0, 1, reply=labels), "p") == 0
    assert judged("row", Answer(404, 0, 1, error="unloaded"), None) == 0
    assert not tally.errors
    assert judged("text", Answer(200, 0, 1, text="new"), "p") == 1
    assert judged("text", Answer(200, 0, 1, text="olnew"), "p", "q") == 2
    assert judged("classify", Answer(200, 0, 1, reply=labels), "q") == 3
    assert judged("text", Answer(200, 0, 1, text="old"), None) == 4
    judged("text", Answer(404, 0, 1, error="gone"), "p")
    judged("text", Answer(503, 0, 1, error="full"), "p")
    judged("text", Answer(0, 0, 1, error="reset"), "p")
    assert tally.errors == {"text: 404": 1, "text: 503": 1, "text: connection": 1}
    assert (tally.server_errors, tally.compared, tally.refused.total()) == (1, 7, 1)


def test_memory_that_grows_is_found() -> None:
    flat = [{"s": s, "gateway": 100.0 + (s < 5) * 50, "workers": 900.0} for s in range(100)]
    assert soak.growth(flat, 100)["both"] == {"mb_before": 1000.0, "mb_after": 1000.0, "growth": 0.0}
    grown = [{**m, "workers": 900.0 + m["s"]} for m in flat]
    assert soak.growth(grown, 100)["both"]["growth"] == pytest.approx(0.078, abs=0.002)
    found = {"wrong": 0, "errors": {}, "compared": 5, "memory": soak.growth(flat, 100)}
    assert soak.failures(found) == []
    assert soak.failures(found | {"memory": soak.growth(grown, 100)}) == ["memory grew by 7.8%"]
    assert len(soak.failures(found | {"wrong": 1, "errors": {"text: 500": 1}, "compared": 0})) == 3


@pytest.fixture(scope="module")
def gateway(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving_ours.Gateway]:
    """A real one over a folder that the benchmarks below fill."""
    store = tmp_path_factory.mktemp("store")
    options = ["--name", "base", "--kv-memory", "16", "--dtype", "float32"]
    with serving_ours.Gateway(str(model_folder), store, 1, options) as started:
        started.store = store  # type: ignore[attr-defined]
        yield started


@pytest.fixture
def one_gateway(gateway: serving_ours.Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks start none of their own: to load a model three times is what takes their time."""

    @contextmanager
    def with_prompts(folder: Path) -> Iterator[serving_ours.Gateway]:
        shutil.copytree(folder, gateway.store, dirs_exist_ok=True)  # type: ignore[attr-defined]
        yield gateway

    monkeypatch.setattr(serving, "gateway", lambda args, engine, folder, *more: with_prompts(folder))
    monkeypatch.setattr(soak, "Gateway", lambda model, folder, threads, options: with_prompts(folder))
    monkeypatch.setattr(serving_scale, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.1)


def test_a_dry_run_fills_every_section(
    one_gateway: None, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rounds", "1", "--warm", "1", "--mixes", "1", "8", "--concurrent", "8", "--new-tokens", "3"]
    scale = ["--loads", "1", "3", "5", "--registered", "12", "--requests", "20", "--check", "2"]
    code = serving.main(["--model", str(model_folder), *SMALL, *sizes, *scale, "--out", str(tmp_path)])
    (found,) = results.newest(tmp_path, "serving")
    assert (code, found["wrong"]) == (0, [])
    assert set(found["throughput"]["1"]) == {"peft", "plain", "transformers", "transformers streamed"}
    assert set(found["throughput"]["8"]) == {"peft", "transformers", "transformers streamed"}
    for contenders in found["throughput"].values():
        for name in ("transformers", "transformers streamed"):
            assert contenders[name]["answers"] == {"equal": 2, "tie": 0, "wrong": 0}
        assert set(contenders["transformers streamed"]["first_token_ms"]) == {"p50", "p99"}
    assert found["ratio"]["transformers"]["ratio"] > 0
    assert found["ratio"]["transformers"]["base"]["answers"]["equal"] == 2
    assert found["classify"]["transformers"]["largest_difference"] < 1e-4
    assert set(found["classify_ratio"]["transformers"]) == {"peft", "peft guide"}
    assert set(found["memory"]["bytes_per_prompt"]) == {"1 to 3", "3 to 5"}
    assert found["registered"]["even"]["misses"] > 0
    assert found["registered"]["answers"]["wrong"] == 0
    assert str(model_folder.parent) not in json.dumps(found)
    printed = capsys.readouterr().out
    titles = (
        "Against the goals",
        "8 concurrent requests",
        "Mixed soft prompts",
        "Bytes for a further",
        "12 registered",
    )
    assert all(f"### {title}" in printed for title in titles)


def test_a_short_soak_finds_nothing_wrong(one_gateway: None, model_folder: Path, tmp_path: Path) -> None:
    options = ["--minutes", "0.05", "--clients", "4", "--prompts", "3", "--texts", "2", "--new-tokens", "3"]
    soak.main(["--model", str(model_folder), *SMALL, *options, "--pause", "0.05", "--out", str(tmp_path)])
    (found,) = results.newest(tmp_path, "soak")
    assert (found["wrong"], found["errors"]) == (0, {})
    assert found["compared"] > 0
    assert found["admin"]["replace"] > 0
    assert set(found["memory"]) == {"gateway", "workers", "both"}
    assert "### Soak: 0.05 minutes, 4 clients" in "\n".join(serving_table.page([found]))


def test_a_gateway_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="the gateway ended with 2: error: no engine 'none'"),
        serving_ours.Gateway("tiny", tmp_path, 1, ["--engine", "none"]),
    ):
        pass


def test_the_client_reports_what_fails() -> None:
    with serving_load.Client() as client:
        nobody = f"http://127.0.0.1:{serving_ours.free_port()}"
        found = client.run(nobody, [serving_load.Call("/v1/completions", {"stream": s}) for s in (True, False)], 2)
    assert [a.status for a in found.answers] == [serving_load.NO_ANSWER] * 2
    assert all("ConnectError" in a.error for a in found.answers)
