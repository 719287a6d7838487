"""The honest table: its draws, one dry run of every contender, what is kept of it, and its page."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality
import quality_contenders as contenders
import quality_data
import quality_table
import results
from quality_data import ALL, CROSS_VALIDATED, DataSet

import foreword
from conftest import write_csv

WORDS = ("parcel", "invoice", "reply", "tweet", "fox", "dog", "praise", "quick")
TOY = DataSet(
    "toy", "Tweet text : {text} Label :", "Classify if the tweet is a complaint or not:", ("4", ALL, CROSS_VALIDATED),
    "made up", {"c": "complaint", "n": "no complaint"},
)  # fmt: skip
CHEAP = ["majority", "tfidf", "zero-shot", "few-shot"]


def rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Distinct texts of two words and a number, half of them complaints."""
    rng = random.Random(seed)
    return [(f"my {rng.choice(WORDS)} is {rng.choice(WORDS)} {seed}{i}", "cn"[i % 2]) for i in range(count)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with one synthetic set, of which two test rows stand in train too."""
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    test = rows(6, 2)
    write_csv(folder / "train.csv", [*rows(12, 1), *test[:2]], ("text", "label"))
    write_csv(folder / "test.csv", test, ("text", "label"))
    for module in (quality, quality_data, quality_table):
        monkeypatch.setattr(module, "DATA", {"toy": TOY})
    return folder.parent


@pytest.fixture
def measure(data: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark on them with a tiny model and one epoch; returns what it wrote."""
    small = partial(contenders.Bench, guide_epochs=1, train={"epochs": 1})
    monkeypatch.setattr(quality, "Bench", small)
    given = ["--data", str(data), "--model", str(model_folder), "--few-shot-tokens", "200", "--out", str(tmp_path)]

    def run(*more: str) -> dict[str, Any]:
        return results.read(quality.main([*given, "--cache", str(tmp_path / "cache.jsonl"), *more]))

    return run


def test_draws_are_balanced_reproducible_different_and_apart_from_the_test(data: Path) -> None:
    drawn = [quality_data.splits(TOY, data, "4", seed)[0] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert set(map(quality_data.normal, drawn[0].train)) != set(map(quality_data.normal, drawn[2].train))
    for split in drawn:
        assert Counter(r["label"] for r in split.train) == {"complaint": 2, "no complaint": 2}
        assert not {r["text"] for r in split.train} & {r["text"] for r in split.test}
    (every,) = quality_data.splits(TOY, data, ALL, 0)
    assert (len(every.train), len(every.test)) == (12, 6)  # without the two that are also in the test
    with pytest.raises(ValueError, match="balanced"):
        quality_data.splits(dataclasses.replace(TOY), data, "14", 0)


def test_a_subset_of_the_test_is_the_same_for_every_seed(data: Path) -> None:
    chosen = [quality_data.splits(TOY, data, "4", seed, test_rows=3)[0].test for seed in (0, 1)]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 3


def test_folds_score_each_row_once_by_the_others(data: Path) -> None:
    parts = quality_data.splits(TOY, data, CROSS_VALIDATED, 0)
    held = [r["text"] for part in parts for r in part.test]
    assert len(parts) == quality_data.FOLDS
    assert len(held) == len(set(held)) == 14
    assert all(not {r["text"] for r in p.train} & {r["text"] for r in p.test} for p in parts)
    assert all(len(p.train) + len(p.test) == 14 for p in parts)


def test_few_shot_examples_are_whole_rounds_that_fit(data: Path, model_folder: Path, tmp_path: Path) -> None:
    (split,) = quality_data.splits(TOY, data, ALL, 0)
    bench = contenders.Bench(str(model_folder))
    job = contenders.Job(bench, TOY, split, 0, tmp_path)
    ids, shots = contenders.examples(job, 100)
    text = bench.backbone.tokenizer.decode(ids)
    assert len(ids) <= 100
    assert 0 < shots < 12
    assert text.count(" Label : complaint\n") == text.count(" Label : no complaint\n") == shots // 2
    assert contenders.examples(dataclasses.replace(job, seed=1), 100) != (ids, shots)


def test_rows_in_front_are_read_like_one_long_row(data: Path, model_folder: Path) -> None:
    """The few-shot opening is shared, and counts as if it stood in every row."""
    (split,) = quality_data.splits(TOY, data, "4", 0)
    backbone = contenders.Bench(str(model_folder)).backbone
    text = contenders.solved(TOY.template, split.train[0])
    prompt = contenders.no_prompt(backbone)
    shared = contenders.label(
        backbone, prompt, TOY.template, split, opening=tuple(backbone.tokenizer(text)["input_ids"])
    )
    assert shared == contenders.label(backbone, prompt, text.replace("{", "{{") + TOY.template, split)


def test_the_guide_is_tokenised_with_its_space_and_the_label_alone(
    data: Path, model_folder: Path, tmp_path: Path
) -> None:
    (split,) = quality_data.splits(TOY, data, "4", 0)
    backbone = contenders.Bench(str(model_folder)).backbone
    job = contenders.Job(contenders.Bench(str(model_folder)), TOY, split, 0, tmp_path)
    guided = contenders.guided(job)
    encoder = contenders.encoder_for(backbone, "{text}", "", guided, 0)
    (example, *_) = encoder.examples(contenders.rows_table(guided.train))
    row = split.train[0]
    assert list(example.context) == backbone.tokenizer(f"Tweet text : {row['text']} Label : ")["input_ids"]
    assert list(example.target) == [*backbone.tokenizer(row["label"])["input_ids"], backbone.end_id]


def test_the_guides_recipe_runs_in_peft_and_in_our_loop(data: Path, model_folder: Path, tmp_path: Path) -> None:
    """Both run, and answer with classes of the data set."""
    (split,) = quality_data.splits(TOY, data, "4", 0)
    job = contenders.Job(contenders.Bench(str(model_folder), guide_epochs=2), TOY, split, 0, tmp_path)
    for contender in ("guide", "guide-peft"):
        (answer,) = contenders.CONTENDERS[contender](job).values()
        assert len(answer.labels) == 6
        assert set(answer.labels) <= {"complaint", "no complaint"}


def test_a_dry_run_measures_goes_on_and_keeps_numbers_only(measure: Any, data: Path, tmp_path: Path) -> None:
    found = measure("--seeds", "0", "--sizes", "4", CROSS_VALIDATED, "--contenders", *CHEAP, "default")
    assert len(found["runs"]) == 2 * 5
    lines = (tmp_path / "cache.jsonl").read_text()
    again = measure("--seeds", "0", "1", "--sizes", "4", "--contenders", *CHEAP)
    added = (tmp_path / "cache.jsonl").read_text().removeprefix(lines).splitlines()
    assert [(r["contender"], r["seed"]) for r in map(json.loads, added)] == [("tfidf", 1), ("few-shot", 1)]
    assert len(again["runs"]) == 12
    text = json.dumps(again)
    assert "parcel" not in text
    assert str(tmp_path) not in text
    assert {r["test_rows"] for r in again["runs"] if r["size"] == CROSS_VALIDATED} == {14}
    assert all(0 <= r["accuracy"] <= 1 and 0 <= r["macro_f1"] <= 1 for r in again["runs"])
    page = quality_table.page(again)
    assert "### toy, 4 training rows" in page
    assert "| TF-IDF + logistic regression | 2 | 4 / 6 |" in page


def test_a_killed_run_loses_its_half_line_alone(measure: Any, tmp_path: Path) -> None:
    only = ["--seeds", "0", "--sizes", "4", "--contenders", "majority"]
    measure(*only)
    cache, (result,) = tmp_path / "cache.jsonl", tmp_path.glob("*-quality.json")
    whole = cache.read_text()
    cache.write_text(whole + whole[:40])
    result.unlink()
    assert len(measure(*only)["runs"]) == 1
    assert cache.read_text() == whole
    cache.unlink()
    assert len(measure(*only)["runs"]) == 1  # known from the results
    assert not cache.exists()


def test_time_that_is_up_stops_before_the_next_cell(measure: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert not measure("--contenders", "majority", "--budget-minutes", "1e-9")["runs"]
    assert "time is up" in capsys.readouterr().out


@pytest.mark.parametrize("contender", ["tune", "tune-given"])
def test_tune_answers_for_its_ensemble_and_its_best_member(
    measure: Any, monkeypatch: pytest.MonkeyPatch, contender: str
) -> None:
    asked: list[Any] = []
    tune = foreword.tune

    def noting(**keys: Any) -> Any:
        asked.append((keys["tune"].get("wording"), keys.get("template"), keys.get("text")))
        return tune(**keys)

    monkeypatch.setattr(foreword, "tune", noting)
    found = measure(
        "--seeds", "0", "--sizes", "4", "--contenders", contender, "--tune-minutes", "0.5", "--tune-members", "2"
    )
    assert [r["contender"] for r in found["runs"]] == [f"{contender}-single", f"{contender}-ensemble"]
    template = quality_data.DATA[found["runs"][0]["data"]].template
    assert asked == [(None, None, "text") if contender == "tune" else ("given", template, None)]
    for run in found["runs"]:
        for metric in ("accuracy", "macro_f1"):
            low, high = run["expected"][metric]["interval"]
            assert low <= run["expected"][metric]["value"] <= high


def run_of(contender: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """A result as the benchmark keeps it."""
    return {
        "data": "sst2", "size": "32", "seed": seed, "contender": contender, "model": "smollm2-135m",
        "train_rows": 32, "test_rows": 1821, "seconds": 10.0, "date": "2026-01-01",
        "machine": {"cpu": "a processor", "threads": 1, "arch": "x"}, "accuracy": accuracy, "macro_f1": accuracy,
    } | more  # fmt: skip


def test_the_page_gives_intervals_coverage_verdicts_and_gaps() -> None:
    def expected(low: float, high: float) -> dict[str, Any]:
        return {m: {"value": 0.85, "interval": [low, high]} for m in ("accuracy", "macro_f1")}

    runs = [run_of("tfidf", s, a) for s, a in enumerate((0.5, 0.6, 0.7))]
    runs += [
        run_of("tune-ensemble", s, 0.86, budget=budget, expected=expected(lo, 0.9))
        for s, (lo, budget) in enumerate(((0.8, "20 minutes"), (0.87, "8 trainings")))
    ]
    runs += [run_of("default", 0, 0.8), run_of("default", 1, 0.99, test_rows=300)]
    result = {"runs": runs, "versions": {"torch": "2"}, "file": "x.json", "data": quality.described()}
    page = quality_table.page(result)
    assert "## SmolLM2-135M-Instruct, dequantised from Q4_1" in page
    assert "| TF-IDF + logistic regression | 3 | 32 / 1821 | 0.600 ± 0.248 [0.500, 0.700] |" in page
    assert "| 0.850 | accuracy 1 of 2, macro-F1 1 of 2 | 10 |" in page
    verdicts = "0.800 **missed** | not measured | not measured | 0.860 must met"
    assert f"| sst2, 32 | accuracy | 0.85 | 0.90 | {verdicts} |" in page
    assert "| **`foreword train`**, defaults | 1 | 32 / 1821 | 0.800 | 0.800 |" in page  # the most test rows
    assert "tune`**, ensemble, 20 minutes or 8 trainings | 2 |" in page
    assert "| ag_news | `News : {text} Topic :` | business, technology, sports, world |" in page
    assert "| backbone, zero-shot | 0 | | not measured | not measured | | | |" in page


def test_the_page_in_docs_is_the_one_made_from_the_newest_result() -> None:
    (newest, *_) = results.newest(results.FOLDER, "quality")
    assert quality_table.PAGE.read_text() == quality_table.page(newest), "run: make results"
