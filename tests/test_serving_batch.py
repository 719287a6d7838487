"""Files of rows, mixed soft prompts: order, columns, what is refused, kill and resume."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import foreword
import tiny
from conftest import ROWS, Cli, three_lines, write_csv
from foreword.artifact.ensemble import write_ensemble
from foreword.artifact.folder import CONFIG, WEIGHTS
from foreword.backbone.attach import compiled
from foreword.backbone.generate import Sampling
from foreword.backbone.load import Backbone, load_backbone
from foreword.config import ModelConfig
from foreword.data.sources import read_table
from foreword.errors import ForewordError
from foreword.jobs.derive import write_derived
from foreword.prompts.soft import SoftPrompt
from foreword.records import Task
from foreword.serving.batch import Batch, in_order
from foreword.serving.bulk import named
from foreword.serving.engine import Decoding, EngineDown, Request, Token
from foreword.serving.engines.transformers import TransformersConfig, TransformersEngine
from foreword.serving.registry import Registry
from foreword.serving.results import Results, open_results, partial_of
from foreword.serving.store import Store
from foreword.serving.text import open_base

TWO = Task(
    "{text} Label :", " ", "Label", ("complaint", "no complaint"), ("complaint", "no complaint"), biases=(0.7, -0.7)
)
THREE = Task("Tweet : {text} by {who} :", " ", "kind", ("question", "praise", "neutral"), ("question", "praise", "fox"))
FREE = Task("{text} and", " ", "rest")
NAMES = ("complaints", "topics", "prefix", "several")
TEXTS = [text for text, _ in ROWS]
NEWLINE = b"\n"
SMALL = ["--kv-memory", 8]
"""MB: what the tiny model has any use for."""


@pytest.fixture(scope="module")
def backbone(model_folder: Path) -> Backbone:
    return load_backbone(ModelConfig(str(model_folder)))


@pytest.fixture(scope="module")
def prompts(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of soft prompts: two tasks, a prefix, an ensemble, and one that writes text."""
    folder = tmp_path_factory.mktemp("prompts")

    def write(name: str, tokens: int, task: Task, prefix: bool = False) -> None:
        values = torch.randn(tokens, tiny.HIDDEN, generator=torch.Generator().manual_seed(tokens))
        prompt = SoftPrompt(compiled(backbone, values), "prefix") if prefix else SoftPrompt(values)
        (folder / name).mkdir(parents=True)
        write_derived(folder / name, prompt, backbone, task, {"how": "drawn", "from": []}, {})

    write("complaints", 4, TWO)
    write("topics", 7, THREE)
    write("prefix", 5, TWO, prefix=True)
    write("writer", 3, FREE)
    write("apart/a", 2, TWO)
    write("apart/b", 6, TWO)
    write_ensemble(folder / "several", [folder / "apart/a", folder / "apart/b"])
    return folder


def rows(count: int, names: tuple[str, ...] = NAMES) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "id": i,
            "text": " ".join(draw.sample(TEXTS, draw.randint(1, 4))),
            "who": "the fox",
            "task": draw.choice(names),
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mixed(model: Path, prompts: Path) -> list[object]:
    return ["--model", model, "--prompts", prompts, "--prompt-column", "task"]


@cache
def loaded(folder: Path) -> foreword.Foreword:
    return foreword.load(folder)


def alone(prompts: Path, row: dict[str, Any]) -> dict[str, float]:
    """A row's probabilities by the library, one row and one soft prompt at a time."""
    names = ["apart/a", "apart/b"] if row["task"] == "several" else [row["task"]]
    each = [loaded(prompts / n).predict([row])[0].probabilities for n in names]
    return {c: sum(p[c] for p in each) / len(each) for c in each[0]}


# --- predictions ------------------------------------------------------------------------------


def test_mixed_rows_are_each_as_alone_and_in_order(cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path) -> None:
    given = rows(24)
    data = write_jsonl(tmp_path / "rows.jsonl", given)
    code, said, err = cli("predict", data, *mixed(model_folder, prompts), "--out", tmp_path / "p.jsonl")
    assert code == 0, err
    assert "24 rows written" in said
    found = read_jsonl(tmp_path / "p.jsonl")
    assert {r["task"] for r in found} == set(NAMES)
    for row, answer in zip(given, found, strict=True):
        assert list(answer) == ["id", "text", "who", "task", "label", "p", "probabilities"]
        assert {k: answer[k] for k in row} == row
        expected = alone(prompts, row)
        assert answer["probabilities"] == pytest.approx(expected, abs=2e-6)
        assert answer["label"] == max(expected, key=lambda c: expected[c])
        assert answer["p"] == answer["probabilities"][answer["label"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.jsonl", "rows.jsonl"]


def test_mixed_rows_as_csv_hold_the_probabilities_as_json(
    cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    given = rows(6)
    given[0]["text"] = 'a "quoted"\nlate parcel, and more'
    given[1]["label"] = "taken"
    data = write_jsonl(tmp_path / "rows.jsonl", given)
    assert cli("predict", data, *mixed(model_folder, prompts), "--out", tmp_path / "p.csv")[0] == 0
    assert cli("predict", data, *mixed(model_folder, prompts), "--out", tmp_path / "p.jsonl")[0] == 0
    with (tmp_path / "p.csv").open(newline="") as f:
        found = list(csv.DictReader(f))
    assert list(found[0])[5:] == ["predicted_label", "p", "probabilities"]
    assert found[0]["text"] == given[0]["text"]
    for line, record in zip(found, read_jsonl(tmp_path / "p.jsonl"), strict=True):
        assert json.loads(line["probabilities"]) == record["probabilities"]
        assert (line["predicted_label"], float(line["p"])) == (record["predicted_label"], record["p"])


def test_a_single_ensemble_and_a_single_run_keep_a_column_a_class(cli: Cli, prompts: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rows.csv", ROWS, header=("text", "kind"))
    for name in ("several", "prefix"):
        code, _, err = cli("predict", prompts / name, data, "--out", tmp_path / "p.csv")
        assert code == 0, err
        with (tmp_path / "p.csv").open(newline="") as f:
            found = list(csv.DictReader(f))
        assert list(found[0]) == ["text", "kind", "label", "p(complaint)", "p(no complaint)"]
        for (text, _), row in zip(ROWS, found, strict=True):
            expected = alone(prompts, {"text": text, "task": name})
            assert {c: float(row[f"p({c})"]) for c in expected} == pytest.approx(expected, abs=2e-6)


async def served(model: Path, prompts: Path, data: Path, engine: Any, work: Any) -> Any:
    """What ``work`` makes of a batch on an engine."""
    try:
        base = await open_base(str(model), await engine.start())
        store = Store([prompts])
        registry = Registry(engine, base, store, 1 << 24)
        try:
            return await work(Batch(engine, base, registry, named(read_table(str(data)), "task", store)))
        finally:
            await registry.close()
    finally:
        await engine.close()


def test_an_engine_scores_the_rows_as_the_library(prompts: Path, model_folder: Path, tmp_path: Path) -> None:
    given = rows(16)
    data = write_jsonl(tmp_path / "rows.jsonl", given)

    async def work(batch: Batch) -> list[Any]:
        revisions = await batch.check()
        assert set(revisions) == {r["task"] for r in given}
        async with aclosing(in_order(batch.predict, range(len(given)), 8)) as found:
            return [p async for p in found]

    engine = TransformersEngine(TransformersConfig(str(model_folder), kv_memory=8))
    found = asyncio.run(served(model_folder, prompts, data, engine, work))
    for row, prediction in zip(given, found, strict=True):
        expected = alone(prompts, row)
        assert prediction.probabilities == pytest.approx(expected, abs=1e-4)
        assert prediction.label == max(expected, key=lambda c: expected[c])


# --- texts ------------------------------------------------------------------------------------


def test_generated_texts_are_those_of_each_soft_prompt_alone(
    cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    given = rows(12, ("writer", "complaints", "prefix"))
    data = write_jsonl(tmp_path / "rows.jsonl", given)
    args = ["--data", data, "--out", tmp_path / "g.jsonl", "--max-new-tokens", 6, *SMALL]
    code, _, err = cli("generate", *mixed(model_folder, prompts), *args)
    assert code == 0, err
    found = read_jsonl(tmp_path / "g.jsonl")
    for row, answer in zip(given, found, strict=True):
        (expected,) = loaded(prompts / row["task"]).generate([row], Sampling(max_new_tokens=6))
        assert answer == {**row, "generated": expected}


def test_one_run_writes_after_every_row_and_each_row_draws_for_itself(cli: Cli, prompts: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "rows.csv", [("the same text", "x")] * 3, header=("text", "generated"))
    drawn = ["--max-new-tokens", 12, "--temperature", 1.5]
    for name, options in (("a", drawn), ("b", [*drawn, "--seed", 1]), ("c", ["--max-new-tokens", 12])):
        args = [prompts / "writer", "--data", data, "--out", tmp_path / f"{name}.csv", *options, *SMALL]
        code, _, err = cli("generate", *args)
        assert code == 0, err

    def texts(name: str) -> list[str]:
        with (tmp_path / f"{name}.csv").open(newline="") as f:
            return [r["predicted_generated"] for r in csv.DictReader(f)]

    assert len(set(texts("a"))) == 3
    assert not set(texts("a")) & set(texts("b"))
    expected = loaded(prompts / "writer").generate([{"text": "the same text"}], Sampling(max_new_tokens=12))
    assert texts("c") == expected * 3


class Faltering(TransformersEngine):
    """Goes down for a while in the middle of the fourth text."""

    down = False
    calls = 0

    @property
    def alive(self) -> bool:
        return super().alive and not self.down

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        self.calls += 1
        falters = self.calls == 4
        async with aclosing(super().generate(request)) as tokens:  # type: ignore[type-var]
            async for token in tokens:
                yield token
                if falters:
                    self.down = True
                    asyncio.get_running_loop().call_later(0.3, self.rise)
                    raise EngineDown("the engine went down")

    def rise(self) -> None:
        self.down = False


def test_a_row_is_run_again_when_the_engine_comes_back(prompts: Path, model_folder: Path, tmp_path: Path) -> None:
    given = rows(6, ("writer",))
    data = write_jsonl(tmp_path / "rows.jsonl", given)

    async def work(batch: Batch) -> list[str]:
        await batch.check(5)
        async with aclosing(in_order(lambda i: batch.write(i, Decoding(5, seed=0)), range(6), 4)) as found:
            return [text async for text in found]

    engine = Faltering(TransformersConfig(str(model_folder), kv_memory=8))
    found = asyncio.run(served(model_folder, prompts, data, engine, work))
    assert found == loaded(prompts / "writer").generate(given, Sampling(max_new_tokens=5))
    assert engine.calls > 6


# --- order ------------------------------------------------------------------------------------


def test_results_come_in_order_with_so_many_under_way() -> None:
    under_way = most = begun = 0

    async def work(index: int) -> int:
        nonlocal under_way, most, begun
        under_way, begun = under_way + 1, begun + 1
        most = max(most, under_way)
        for _ in range(random.Random(index).randint(1, 40)):
            await asyncio.sleep(0)
        under_way -= 1
        return index

    async def run() -> list[int]:
        found = []
        async with aclosing(in_order(work, range(200), window=8, ahead=20)) as results:
            async for index in results:
                assert begun <= len(found) + 21
                found.append(index)
        return found

    assert asyncio.run(run()) == list(range(200))
    assert most == 8


def test_closing_early_ends_what_is_under_way() -> None:
    ended: list[int] = []

    async def work(index: int) -> int:
        try:
            await asyncio.sleep(0 if index == 0 else 3600)
        except asyncio.CancelledError:
            ended.append(index)
            raise
        return index

    async def run() -> None:
        async with aclosing(in_order(work, range(100), window=4, ahead=10)) as results:
            async for index in results:
                assert index == 0
                break

    asyncio.run(asyncio.wait_for(run(), 20))
    assert ended == [1, 2, 3, 4] or ended == [1, 2, 3]


# --- refused ----------------------------------------------------------------------------------


REFUSED = {
    "unknown name": ({"task": "complaint"}, "row 3 names the soft prompt 'complaint'", "complaints"),
    "no name": ({"task": " "}, "row 3 names no soft prompt", "fill it in"),
    "empty text": ({"text": ""}, "row 3 has nothing in column 'text'", "fill it in"),
    "no classes": ({"task": "writer"}, "'writer' writes text", "generate"),
    "outside": ({"task": "../prompts"}, "row 3 names the soft prompt '../prompts'", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_row_is_named_before_anything_is_written(
    cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path, case: str
) -> None:
    change, what, fix = REFUSED[case]
    given = rows(5, ("complaints",))
    given[2].update(change)
    data = write_jsonl(tmp_path / "rows.jsonl", given)
    lines = three_lines(cli("predict", data, *mixed(model_folder, prompts), "--out", tmp_path / "p.jsonl"))
    assert what in lines[0]
    assert fix in lines[2]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


TEXT_REFUSED = {
    "ensemble": ({"task": "several"}, 8, "'several' is an ensemble"),
    "empty text": ({"text": " "}, 8, "row 3 has nothing in column 'text'"),
    "too long": ({"text": "fox " * 400}, 300, "row 3 has"),
}


@pytest.mark.parametrize("case", TEXT_REFUSED)
def test_a_row_that_cannot_be_written_after_is_named_before_anything_runs(
    cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path, case: str
) -> None:
    change, tokens, what = TEXT_REFUSED[case]
    given = rows(5, ("writer",))
    given[2].update(change)
    data = write_jsonl(tmp_path / "rows.jsonl", given)
    args = ["--data", data, "--out", tmp_path / "g.jsonl", "--max-new-tokens", tokens, *SMALL]
    assert what in three_lines(cli("generate", *mixed(model_folder, prompts), *args))[0]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


OPTIONS: dict[str, tuple[str, str]] = {
    "predict ROWS": ("no soft prompt given", "--prompts"),
    "predict RUN ROWS --prompts RUN": ("and --prompts", "one of them"),
    "predict RUN ROWS ROWS": ("3 arguments", "a run and its rows"),
    "predict RUN ROWS --prompt-column task": ("--prompt-column", "--prompts"),
    "predict RUN ROWS --engine vllm": ("--engine vllm", "--prompts"),
    "predict ROWS --prompts RUN --model M --engine vlm": ("no engine 'vlm'", "vllm"),
    "predict ROWS --prompts RUN": ("no model given", "--model"),
    "predict ROWS --prompts RUN --model M --vllm-python P": ("--vllm-python", "--engine vllm"),
    "predict ROWS --prompts PROMPTS --model M": ("5 soft prompts", "--prompt-column"),
    "predict ROWS --prompts PROMPTS --model M --prompt-column tsk": ("no column 'tsk'", "task"),
    "predict ROWS --prompts ./nowhere --model M": ("no such folder", "--prompts"),
    "generate RUN": ("no text given", "--data"),
    "generate RUN text --resume": ("no rows given", "--data"),
    "generate RUN text --data ROWS": ("a text and --data", "one of them"),
    "generate --data ROWS": ("no soft prompt given", "--prompts"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_contradict_each_other(
    cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path, case: str
) -> None:
    what, fix = OPTIONS[case]
    data = write_jsonl(tmp_path / "rows.jsonl", rows(2))
    known = {"RUN": prompts / "complaints", "PROMPTS": prompts, "ROWS": data, "M": model_folder}
    args: list[object] = [known.get(word, word) for word in case.split()]
    out = [] if case == "generate RUN" else ["--out", tmp_path / "p.jsonl"]
    lines = three_lines(cli(*args, *out))
    assert what in lines[0]
    assert fix in lines[2]


# --- stopped and gone on with -----------------------------------------------------------------


def killed(args: list[object], out: Path, lines: int) -> int:
    """Starts the command line and kills it once so many lines are in the partial file; its exit status."""
    command = [sys.executable, "-m", "foreword", *map(str, args)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    part = partial_of(out)
    while time.monotonic() < deadline and process.poll() is None:
        if part.exists() and part.read_bytes().count(NEWLINE) >= lines:
            break
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate(timeout=60)
    assert not out.exists(), f"it was over before it could be killed: {err.decode()}"
    return process.returncode


def test_killed_predictions_go_on_to_the_same_bytes(
    cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path
) -> None:
    given = rows(900)
    given[100]["text"] = 'a "quoted"\nline'
    data = write_jsonl(tmp_path / "rows.jsonl", given)
    out = tmp_path / "p.csv"
    args: list[object] = ["predict", data, *mixed(model_folder, prompts), "--out"]
    assert killed([*args, out], out, 250) == -signal.SIGKILL
    cut = partial_of(out).read_bytes()
    assert cut.endswith(b"\n")
    rest = three_lines(cli(*args, out))
    assert "--resume" in rest[2]

    others = write_jsonl(tmp_path / "others.jsonl", [*given[:-1], {**given[-1], "text": "praise"}])
    retrained = shutil.copytree(prompts, tmp_path / "retrained")
    shutil.copy(prompts / "prefix" / WEIGHTS, retrained / "complaints" / WEIGHTS)
    shutil.copy(prompts / "prefix" / CONFIG, retrained / "complaints" / CONFIG)
    for changed, what in (
        (["predict", others, *mixed(model_folder, prompts)], "rows"),
        (["predict", data, *mixed(model_folder, retrained)], "soft prompts (complaints)"),
        (
            ["predict", data, *mixed(model_folder, prompts), "--dtype", "bfloat16"],
            "dtype ('float32' -> 'bfloat16'), backbone (probe)",
        ),
    ):
        assert f"this changed: {what}" in three_lines(cli(*changed, "--out", out, "--resume"))[0]
    assert partial_of(out).read_bytes() == cut

    partial_of(out).write_bytes(cut + b'7000,"half a ro')  # as a power cut would leave it
    code, said, err = cli(*args, out, "--resume")
    assert code == 0, err
    assert "going on after row" in said
    assert out.read_bytes().startswith(cut[: cut.rindex(b"\n", 0, -1)])
    assert cli(*args, tmp_path / "whole.csv")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_stopped_texts_go_on_to_the_same_bytes(
    cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows(160, ("writer", "complaints", "prefix")))
    out = tmp_path / "g.jsonl"
    args: list[object] = ["generate", *mixed(model_folder, prompts), "--data", data, "--max-new-tokens", 6]
    args += ["--temperature", 1.0, "--in-flight", 8, *SMALL, "--out"]
    assert killed([*args, out], out, 1) == -signal.SIGKILL
    first = partial_of(out).read_bytes()
    assert first.endswith(b"\n")
    assert "sampling (seed)" in three_lines(cli(*args, out, "--resume", "--seed", 1))[0]

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", interrupting(Results.add, after=5))
        code, said, _ = cli(*args, out, "--resume")
    assert code == 130
    assert f"going on after row {first.count(NEWLINE)} of 160" in said
    assert "go on with: " in said
    assert said.rstrip().endswith("--resume")
    second = partial_of(out).read_bytes()
    assert second.startswith(first)
    assert first.count(NEWLINE) + 5 <= second.count(NEWLINE) < 160

    code, _, err = cli(*args, out, "--resume")
    assert code == 0, err
    assert out.read_bytes().startswith(second)
    assert cli(*args, tmp_path / "whole.jsonl")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_two_runs_do_not_write_one_file(cli: Cli, prompts: Path, model_folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows(2, ("complaints",)))
    out = tmp_path / "p.jsonl"
    with open_results(out, ["id"], {"job": "another"}, resume=False) as results:
        results.add([7])
        lines = three_lines(cli("predict", data, *mixed(model_folder, prompts), "--out", out, "--resume"))
        assert "another run is writing here" in lines[0]
        results.finish()
    assert read_jsonl(out) == [{"id": 7}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.jsonl", "rows.jsonl"]


def test_a_full_disk_is_said_and_keeps_whole_rows(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(ForewordError, match="cannot write") as caught, open_results(out, ["x"], {}, False) as found:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
            for i in range(1000):
                found.add([i])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "--resume" in caught.value.fix
    assert partial_of(out).stat().st_size == 4000
    with open_results(out, ["x"], {}, True, unit=10) as again:
        assert again.done % 10 == 0
        assert 400 > again.done > 0
        for i in range(again.done, 1000):
            again.add([i])
        again.finish()
    assert read_jsonl(out) == [{"x": i} for i in range(1000)]


def interrupting(add: Any, after: int) -> Any:
    """``Results.add`` that lets a Ctrl-C arrive with so many rows."""
    count = 0

    def act(self: Results, values: Any) -> None:
        nonlocal count
        count += 1
        add(self, values)
        if count == after:
            signal.raise_signal(signal.SIGINT)

    return act
