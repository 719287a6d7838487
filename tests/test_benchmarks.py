"""The benchmark suite: its statistics, meters, opponents, comparison and page, and one dry run."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compare
import cpu
import gpu
import measure
import methods
import methods_table
import opponents
import ours
import results
import shapes
import startup
import suite
import table
from quality_data import DataSet

from conftest import ROWS, write_csv
from foreword.backbone.memory import Peak

CPU = torch.device("cpu")
P = 4


def times(median: float, spread: float = 0.02) -> dict[str, float]:
    """A summary around a median, quartiles ``spread`` away from it."""
    low, high = median * (1 - spread), median * (1 + spread)
    return {"median_s": median, "min": low * 0.9, "max": high * 1.1, "q1": low, "q3": high, "runs": 12}


def result(step: float, guide: float, date: str = "2026-01-01", **more: Any) -> dict[str, Any]:
    """A results file with one size of soft prompt."""
    section = {"foreword": times(step), "guide": times(guide)}
    return {
        "kind": "cpu", "date": date, "machine": {"arch": "x86_64", "threads": 2}, "versions": {"torch": "2"},
        "dtype": "float32", "seed": 0, "model": "tiny", "rows": "rows.csv", "row_count": 10, "batch_size": 8,
        "rounds": 3, "file": f"{date}-cpu.json",
        "results": [
            {"virtual_tokens": 8, "layout": "packed", "train_step": section,
             "train_step_ratio": {"guide": round(guide / step, 2)}},
        ],
    } | more  # fmt: skip


@pytest.fixture(scope="module")
def setting(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ours.Setting:
    """Ten rows and a soft prompt of four virtual tokens on the tiny model."""
    path = write_csv(tmp_path_factory.mktemp("rows") / "rows.csv", ROWS)
    return ours.prepare(ours.load(str(model_folder), "cpu", "float32"), str(path), "Tweet text", "Label", P, 2)


def test_a_summary_has_median_extremes_and_quartiles() -> None:
    found = measure.summary([5.0, 1.0, 2.0, 3.0, 4.0])
    assert found == {"median_s": 3.0, "min": 1.0, "max": 5.0, "q1": 2.0, "q3": 4.0, "runs": 5}
    assert measure.summary([0.123456]) == {
        "median_s": 0.1235, "min": 0.1235, "max": 0.1235, "q1": 0.1235, "q3": 0.1235, "runs": 1,
    }  # fmt: skip
    assert measure.median_rate([10, 30, 30], [1.0, 2.0, 1.0]) == 15.0


def test_contenders_take_turns_and_the_first_round_is_dropped() -> None:
    calls: list[tuple[str, int]] = []
    works = {name: lambda item, name=name: calls.append((name, item)) for name in "ab"}
    found = measure.alternate(works, [1, 2], rounds=2, device=CPU)
    assert {name: len(values) for name, values in found.items()} == {"a": 4, "b": 4}
    assert calls[:4] == [("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert sorted(calls) == sorted([(name, item) for name in "ab" for item in (1, 2)] * 3)


@pytest.mark.skipif(Peak(torch.device("cpu")).size is None, reason="resident peaks are Linux only")
def test_the_memory_meter_sees_what_a_call_holds_at_its_peak() -> None:
    assert measure.peak_memory(lambda: bytearray(200_000_000), CPU, runs=1) == pytest.approx(200, abs=10)
    held = bytearray(100_000_000)  # what was held before does not count
    assert measure.peak_memory(lambda: len(held), CPU, runs=1) == pytest.approx(0, abs=10)


def test_useful_work_counts_layers_where_tokens_are_read_and_the_head_at_targets(setting: ours.Setting) -> None:
    body, head = measure.weights(setting.model)
    config = setting.backbone.config
    assert head == config.vocab_size * config.hidden_size
    embeddings = 2 - int(config.tie_word_embeddings)
    assert body + embeddings * head == setting.backbone.parameters
    assert measure.step_flops(body=10, head=100, fed=7, targets=3) == 4 * (70 + 300)


def test_rows_are_padded_on_the_left_and_cut_there() -> None:
    found = opponents.padded([([1, 2, 3], [4, 5]), ([6], [7])], pad=0, length=4)
    assert found["input_ids"].tolist() == [[2, 3, 4, 5], [0, 0, 6, 7]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert found["labels"].tolist() == [[-100, -100, 4, 5], [-100, -100, -100, 7]]
    assert opponents.padded([([1], [2]), ([1, 2], [3])], pad=0, length=None)["input_ids"].shape == (2, 3)


def test_without_padding_prompt_tuning_is_the_same_work_as_ours(setting: ours.Setting) -> None:
    """One row leaves nothing to pad: the same soft prompt has the same loss in both, before and after a step."""
    row = setting.examples[:1]
    theirs, mine = opponents.best(setting), ours.Foreword(setting)
    for _ in range(2):
        assert theirs.step(row) == pytest.approx(mine.step(row), abs=1e-3)
    rival = opponents.PerClass(setting)
    singles = [[e] for e in setting.examples]
    rival.guide.length = None
    fresh = ours.Foreword(setting)
    assert rival.score(singles, setting.label_ids) == fresh.score(singles, setting.label_ids)


def test_opponents_leave_the_shared_backbone_as_it_was(setting: ours.Setting) -> None:
    before = {name: tensor.clone() for name, tensor in setting.model.state_dict().items()}
    for make in opponents.TRAINING.values():
        make(setting).step(setting.examples[:8])
    after = setting.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad for p in setting.model.parameters())
    assert not setting.model.training


@pytest.mark.parametrize(
    ("step", "guide", "verdict"),
    [
        (1.00, 2.0, "same"),
        (1.03, 2.0, "same"),  # within the quartiles
        (1.50, 2.0, "slower"),
        (0.70, 2.0, "faster"),
        (1.50, 3.0, "same"),  # the whole machine was slower
        (1.00, 1.0, "slower"),  # the machine was twice as fast, and we were not
    ],
)
def test_the_comparison_takes_the_machines_speed_out(step: float, guide: float, verdict: str) -> None:
    (found,) = compare.compare(result(1.0, 2.0), result(step, guide))
    assert found.verdict == verdict
    assert found.raw == pytest.approx(100 * (step - 1))
    assert found.normalised == pytest.approx(100 * (step * 2.0 / guide - 1))


def test_without_an_opponent_raw_times_decide_and_without_quartiles_extremes() -> None:
    old, new = result(1.0, 2.0), result(1.5, 3.0)
    del new["results"][0]["train_step"]["guide"]
    (found,) = compare.compare(old, new)
    assert (found.verdict, found.normalised) == ("slower", None)
    for key in ("q1", "q3"):
        del old["results"][0]["train_step"]["foreword"][key]
    old["results"][0]["train_step"]["foreword"]["max"] = 1.49
    assert compare.compare(old, new)[0].verdict == "same"


def test_the_comparison_pairs_the_newest_with_the_last_of_its_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(content: Mapping[str, Any], name: str = "") -> Path:
        return results.write({k: v for k, v in content.items() if k != "file"}, tmp_path, name)

    write(result(1.0, 2.0, "2026-01-01"))
    assert compare.main(["--results", str(tmp_path)]) == 0
    assert "nothing to compare" in capsys.readouterr().out
    write(result(9.0, 2.0, "2026-01-02", model="another"))
    write(result(9.0, 2.0, "2026-01-02", kind="gpu"))
    newest = write(result(1.5, 2.0, "2026-01-03"))
    assert compare.main(["--results", str(tmp_path), "--kind", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "2026-01-01-cpu.json -> 2026-01-03-cpu.json" in printed
    assert "+50.0 %" in printed
    assert compare.main([str(newest), str(newest)]) == 0
    with pytest.raises(SystemExit):
        compare.main([str(newest), str(tmp_path / "2026-01-02-gpu.json")])


def test_a_day_has_one_file_unless_a_name_is_given(tmp_path: Path) -> None:
    names = [results.write(result(1.0, 2.0), tmp_path, name).name for name in ("", "", "quiet")]
    assert names == ["2026-01-01-cpu.json", "2026-01-01-cpu.json", "2026-01-01-cpu-quiet.json"]


def test_data_is_named_without_this_machines_folders(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").touch()
    assert results.data_name(str(tmp_path / "set" / "train.csv")) == "set/train.csv"
    assert results.data_name("bundled:complaints") == "bundled:complaints"


def test_the_page_shows_what_was_measured_and_leaves_the_rest_out() -> None:
    page = table.page([result(1.0, 2.2)])
    assert "| step, P = 8 | PEFT guide | 2.20x | 2.0x | 2.4x | must met |" in page
    assert "| 8 | PEFT guide | 2.20 [1.94, 2.47] | 2.20 | 12 |" in page
    assert "tokens/s" not in page
    assert "Scoring" not in page
    full = result(1.0, 2.2, ceilings={"float32": 1.3e11, "bfloat16": 1e9, "copy": 1.2e10})
    size = full["results"][0]
    size["train_step"]["foreword"] |= {"tokens_per_s": 301.2, "flops_share": 0.617}
    size |= {"peak_memory_mb": {"foreword": 400.0, "guide": 1000.0}, "memory_ratio": {"guide": 0.4}}
    size |= {"two_class_scoring": {"foreword": times(2.0)}, "two_class_scoring_ratio": {"per-class": 3.0}}
    page = table.page([full, result(0.002, 0.004, kind="gpu")])
    assert "| 8 | **Foreword** | 1.00 [0.882, 1.12] |  | 12 | 301 | 62% | 400 |" in page
    assert "| step's peak memory above the weights, P = 8 | PEFT guide | 0.400 | 0.6 | 0.4 | aim met |" in page
    assert "| two-class scoring, P = 8 | PEFT, class by class | 3.00x | 4.0x | 6.0x | **missed** |" in page
    assert "float32 130 GFLOP/s" in page
    assert "## GPU" in page
    assert "| 8 | **Foreword** | 2.00 [1.76, 2.24] |" in page  # milliseconds


def test_the_page_in_docs_is_the_one_made_from_the_newest_results() -> None:
    assert table.PAGE.read_text() == table.page(table.sources()), "run: make bench-table"
    (newest, *_) = results.newest(results.FOLDER, "methods")
    assert methods_table.PAGE.read_text() == methods_table.page(newest), "run: make bench-table"


def test_the_methods_are_measured_as_users_train_them(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "test"):
        write_csv(tmp_path / f"{name}.csv", [(f"{text} {name}", label) for text, label in ROWS], ("text", "label"))
    toy = DataSet(tmp_path.name, "{text} Label :", "", ("8",), "ten made-up rows")
    monkeypatch.setattr(methods, "DATA", {"sst2": toy})
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    only = ["--only", "prompt-tuning", "--only", "prefix-tuning"]
    chosen = [*only, "--virtual-tokens", "4", "--model", str(model_folder)]
    given = ["--data", str(tmp_path.parent), "--datasets", "sst2", "--epochs", "1", *chosen]
    monkeypatch.setattr(sys, "argv", ["methods.py", *given])
    methods.main()
    monkeypatch.setattr(sys, "argv", ["methods.py", "--resume", "--seeds", "2", *given])
    methods.main()
    (found,) = results.newest(tmp_path, "methods")
    assert [(r["variant"], r["seed"]) for r in found["runs"]] == [
        ("prompt-tuning", 0), ("prefix-tuning", 0), ("prompt-tuning", 1), ("prefix-tuning", 1)
    ]  # fmt: skip
    page = methods_table.page(found)
    assert "| prefix-tuning | keys and values of every layer" in page
    assert "4 cached" in page
    assert set(methods_table.FACTS) == set(methods.VARIANTS)


def test_the_wait_for_a_first_step_ends_the_program(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    event = json.dumps({"event": "step", "seconds": 0.25})
    script = f"import time; open({str(metrics)!r}, 'w').write({event!r} + '\\n'); time.sleep(60)"
    assert -0.25 < startup.first_step([sys.executable, "-c", script], metrics) < 10
    with pytest.raises(RuntimeError, match="no rows"):
        startup.first_step([sys.executable, "-c", "raise SystemExit('no rows')"], tmp_path / "none.jsonl")


def test_a_dry_run_fills_every_section_with_finite_figures(
    model_folder: Path, train_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "MATMUL_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(suite, "MEMORY_RUNS", 1)
    options = ["--model", str(model_folder), "--data", str(train_csv), "--text", "Tweet text", "--label", "Label"]
    sizes = ["--virtual-tokens", str(P), "--rounds", "1", "--startup-runs", "0"]
    path = cpu.main([*options, *sizes, "--out", str(tmp_path / "out")])
    found = json.loads(path.read_text())
    (size,) = found["results"]
    assert size["virtual_tokens"] == P
    assert set(size["train_step"]) == {"foreword", *opponents.TRAINING}
    assert set(size["scoring"]) == {"foreword", "guide", "best"}
    assert set(size["two_class_scoring"]) == {"foreword", "per-class"}
    assert set(size["train_step"]["guide"]) == {*times(1.0), "tokens_per_s", "flops_share"}
    for key in ("train_step_ratio", "scoring_ratio", "two_class_scoring_ratio"):
        assert all(value > 0 for value in size[key].values())
    assert all(math.isfinite(value) for value in numbers(found))
    assert str(model_folder.parent) not in path.read_text()
    assert table.page([found | {"file": path.name}]).count("### ") == 4


def test_free_text_is_timed_in_training_only(setting: ours.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "MEMORY_RUNS", 1)
    free = dataclasses.replace(setting, label_ids=())
    found = suite.measure(free, ["guide"], 1, {"float32": 1e9})
    assert set(found["train_step"]) == {"foreword", "guide"}
    assert "scoring" not in found


def test_the_gpu_benchmark_runs_dry_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "MATMUL_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(gpu, "TINY", dataclasses.replace(gpu.TINY, populations=(2, 3)))
    options = ["--device", "cpu", "--tiny", "--rounds", "1", "--guide-epochs", "1", "--engines", "eager", "graph"]
    path = gpu.main([*options, "--out", str(tmp_path)])
    found = json.loads(path.read_text())
    *small, large = found["results"]
    assert found["kind"] == "gpu"
    assert [r["model"] for r in found["results"]] == list(shapes.SHAPES)
    assert [r["layout"] for r in found["results"]] == ["packed", "rows", "packed"]
    for size in small:
        assert set(size["train_step"]) == {"foreword", "guide", "best"}
        assert [g["members"] for g in size["populations"]] == [1, 2, 3]
        assert set(size["populations"][0]["failed"]) == {"graph"}  # needs a card
        assert set(size["populations"][2]["step"]) == {"eager", "guide", "best"}
        assert size["guide_job"]["guide"]["scaled_from_epochs"] == 1
        for key in ("train_step_ratio", "population_2_ratio", "population_3_ratio", "floor_ratio", "guide_job_ratio"):
            assert all(value > 0 for value in size[key].values()), key
    assert set(large["train_step"]) == {"foreword", "recompute", "best", "lora32"}
    assert large["engines"] == {"foreword": "eager", "recompute": "eager"}
    assert not large["failed"]
    assert all(math.isfinite(value) for value in numbers(found))
    page = table.page([found | {"file": path.name}])
    for title in ("Against the goals", "Training step", "Engines and populations", "PEFT's guide as a job"):
        assert f"### {title}" in page
    assert "SmolLM2-135M, K = 1: graph did not work" in page
    assert results.comparable(found, results.newest(tmp_path, "gpu")[0])
    assert not results.comparable(found, found | {"kind": "cpu"})
    capsys.readouterr()
    assert compare.main([str(path), str(path)]) == 0
    assert "train step, bloomz-560m, P = 8" in capsys.readouterr().out


def test_the_gpu_benchmark_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, said in (([], "no CUDA device here"), (["--device", "cpu"], "--out")):
        with pytest.raises(SystemExit) as stop:
            gpu.main(options)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_random_rows_have_the_lengths_they_stand_for() -> None:
    found = shapes.backbone("SmolLM2-135M", CPU, torch.float32, tiny=True)
    rows = shapes.tweets(found, 400, P, 1)
    lengths = [len(e.context) + len(e.target) for e in rows.examples]
    assert max(lengths) == shapes.TWEETS.longest
    assert sum(lengths) / len(lengths) == pytest.approx(shapes.TWEETS.mean, abs=2)
    assert len(rows.opening) == shapes.OPENING
    assert {e.target for e in rows.examples} == set(rows.label_ids)
    rows = shapes.reasoning(found, 400, P, 1)
    lengths = [len(e.context) + len(e.target) for e in rows.examples]
    assert max(lengths) == shapes.REASONING.longest
    assert sum(lengths) / len(lengths) == pytest.approx(shapes.REASONING.mean, abs=15)
    share = sum(len(e.target) for e in rows.examples) / sum(lengths)
    assert share == pytest.approx(shapes.TARGET_SHARE, abs=0.02)


def numbers(content: Any) -> Iterator[float]:
    """Every number in a JSON document."""
    if isinstance(content, Mapping):
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            yield from numbers(part)
    elif isinstance(content, (int, float)):
        yield content
