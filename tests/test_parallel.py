"""Several processes: every layout ends where one process ends, sends no more than it must, and survives a loss."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import foreword
from conftest import ROWS
from foreword.artifact.folder import WEIGHTS
from foreword.errors import ForewordError
from foreword.parallel.layout import Layout, parse_layout
from foreword.parallel.world import ALONE, World

TESTS = Path(__file__).parent
DATA = [{"text": text, "label": label} for text, label in ROWS]
SHARED: Mapping[str, Any] = {"verb": "train", "data": DATA, "text": "text", "label": "label"}
TRAIN = {"epochs": 2, "batch_size": 4}
SEARCH = {
    "minutes": 0, "trainings": 9, "members": 3, "folds": 2, "virtual_tokens": (4,), "untrained": "never",
}  # fmt: skip
WITH_PLAIN = {**SEARCH, "trainings": 3, "methods": ("prompt-tuning",), "untrained": "auto"}
"""The tiny model as it is does better than the little that is trained."""
FORMS: Mapping[str, Mapping[str, Any]] = {
    "rows": {"eval_data": DATA[:5]},
    "hard": {"train": {**TRAIN, "batch_size": 2, "accumulate": 2, "clip": 1.0, "recompute": True}},
    "population": {"prompt": {"population": 3, "virtual_tokens": 4}},
    "prefix": {"prompt": {"method": "prefix-tuning", "virtual_tokens": 5}, "eval_data": DATA[:5]},
    "context": {"prompt": {"method": "context-tuning", "virtual_tokens": 40}},
    "validated": {"train": {**TRAIN, "select": "loss", "patience": 1}, "data_keys": {"validation_fraction": 0.3}},
    "texts": {"data_keys": {"task": "generate", "eval_fraction": 0.5}},
}
"""Runs, by what is particular about them, that every layout must give."""
LAYOUTS: Mapping[int, Mapping[str, Sequence[str]]] = {
    2: {
        "ddp=2": tuple(FORMS),
        "fsdp=2": ("rows", "hard", "population", "prefix"),
        "tp=2": ("rows", "hard", "population", "context"),
    },
    4: {"ddp=4": ("hard",), "ddp=2,fsdp=2": ("rows",), "tp=2,fsdp=2": ("prefix",), "ddp=2,tp=2": ("population",)},
}
CASES = [(n, layout, form) for n, found in LAYOUTS.items() for layout, forms in found.items() for form in forms]


def job(model: Path, out: Path, form: str, parallel: str = "") -> dict[str, Any]:
    """Arguments of one training."""
    given = dict(FORMS[form])
    keys = given.pop("data_keys", {})
    data = {"data": DATA} if not keys else {"data": {"path": str(model.parent / "rows.jsonl"), **keys}}
    train = {"train": {**TRAIN, **given.pop("train", {}), **({"parallel": parallel} if parallel else {})}}
    return {**SHARED, **data, "model": str(model), "out": str(out), **train, **given}


def launch(model: Path, jobs: Mapping[int, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Does jobs in so many processes each."""
    command = [sys.executable, str(TESTS / "parallel_worker.py"), str(model)]
    for count, mine in jobs.items():
        file = folder / f"jobs-{count}.json"
        file.write_text(json.dumps(list(mine)))
        command += [str(count), str(free_port()), str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr[-4000:]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def name_of(layout: str, form: str, count: int = 2) -> str:
    return f"{count}-{layout}-{form}".replace("=", "").replace(",", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Path:
    (model_folder.parent / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in DATA))
    return model_folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every form by one process."""
    out = tmp_path_factory.mktemp("alone")
    for form in FORMS:
        arguments = job(model, out / name_of("one", form, 1), form)
        arguments.pop("verb")
        foreword.train(quiet=True, **arguments)
    return out


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, one that is stopped and resumed, and a search."""
    out = tmp_path_factory.mktemp("parallel")
    jobs = {
        count: [job(model, out / name_of(lay, f, count), f, lay) for lay, forms in found.items() for f in forms]
        for count, found in LAYOUTS.items()
    }
    again = job(model, out / "resumed", "rows", "ddp=2")
    jobs[2] += [{**again, "stop": 4}, {**again, "resume": True}]
    jobs[2].append({**SHARED, "verb": "tune", "model": str(model), "out": str(out / "tuned"), "tune": SEARCH,
                    "train": TRAIN, "slow": 0.6})  # fmt: skip
    jobs[2].append({**SHARED, "verb": "tune", "model": str(model), "out": str(out / "plain"), "tune": WITH_PLAIN,
                    "train": TRAIN})  # fmt: skip
    launch(model, jobs, out)
    return out


def steps(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] == "step"]


@pytest.mark.parametrize(("count", "layout", "form"), CASES, ids=lambda x: str(x))
def test_every_layout_ends_where_one_process_ends(runs: Path, alone: Path, count: int, layout: str, form: str) -> None:
    """Weights, the losses and gradients of all steps, and scores."""
    ours, theirs = runs / name_of(layout, form, count), alone / name_of("one", form, 1)
    assert len(steps(ours)) == len(steps(theirs)) > 0
    for mine, reference in zip(steps(ours), steps(theirs), strict=True):
        assert mine["loss"] == pytest.approx(reference["loss"], abs=1e-5)
        norms = [x if isinstance(x, list) else [x] for x in (mine["grad_norm"], reference["grad_norm"])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4, abs=1e-5)
    for file in (p.relative_to(theirs) for p in theirs.rglob(WEIGHTS)):
        mine, reference = load_file(ours / file), load_file(theirs / file)
        for name, tensor in reference.items():
            torch.testing.assert_close(mine[name], tensor, atol=2e-5, rtol=0)
    mine, reference = (json.loads((r / "foreword.json").read_text()) for r in (ours, theirs))
    assert mine["backbone"] == reference["backbone"]
    assert set(mine["scores"]) == set(reference["scores"])
    for name in {"accuracy", "macro_f1", "exact_match", "chrf"} & set(reference["scores"]):
        assert mine["scores"][name] == reference["scores"][name]
    if reference["scores"]:
        assert mine["scores"]["loss"] == pytest.approx(reference["scores"]["loss"], abs=1e-5)


@pytest.mark.parametrize(("layout", "form", "most"), [("ddp=2", "rows", 3), ("ddp=2", "texts", 3), ("tp=2", "rows", 5)])
def test_processes_with_the_whole_backbone_divide_the_rows_to_score(
    runs: Path, layout: str, form: str, most: int
) -> None:
    """Five of them: one process reads three. Those of a tensor-parallel reader read the same."""
    read = json.loads((runs / name_of(layout, form) / "read.json").read_text())
    assert max(read) == most


def test_only_the_first_process_writes(runs: Path, alone: Path) -> None:
    """No file more than one process leaves, each line of the metrics once."""
    ours, theirs = ({str(p.relative_to(r)) for p in r.rglob("*")} for r in (
        runs / name_of("ddp=2", "population"), alone / name_of("one", "population", 1)))  # fmt: skip
    assert ours - theirs == {"sent.json", "read.json"}
    assert [s["step"] for s in steps(runs / name_of("ddp=2", "rows"))] == list(
        range(1, len(steps(alone / name_of("one", "rows", 1))) + 1)
    )


@pytest.mark.parametrize("form", ["rows", "population", "prefix", "hard"])
def test_a_step_sends_the_gradient_of_what_is_trained_and_nothing_else(runs: Path, form: str) -> None:
    run = runs / name_of("ddp=2", form)
    folders = sorted((run / "members").iterdir()) if form == "population" else [run]
    trained = sum(json.loads((f / "foreword.json").read_text())["training"]["trainable"] for f in folders)
    sent = json.loads((run / "sent.json").read_text())
    assert len(sent) == len(steps(run))
    assert all(step == [4 * trained] for step in sent)


def test_interrupted_and_resumed_by_as_many_is_uninterrupted_byte_for_byte(runs: Path) -> None:
    """One process wants to stop: all do, after the same step."""
    whole, resumed = runs / name_of("ddp=2", "rows"), runs / "resumed"
    assert json.loads((resumed / "stopped.json").read_text()) == 4
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert [s["loss"] for s in steps(resumed)] == [s["loss"] for s in steps(whole)]


@pytest.mark.parametrize(("name", "search"), [("tuned", SEARCH), ("plain", WITH_PLAIN)])
def test_a_search_over_processes_is_the_search_of_one(
    name: str, search: dict[str, Any], runs: Path, model: Path, tmp_path: Path
) -> None:
    """Also where one process is busy for longer than the others wait for a step."""
    foreword.tune(
        model=str(model), data=DATA, text="text", label="label", out=tmp_path / "one", quiet=True, train=TRAIN,
        tune=search,
    )  # fmt: skip
    same_search(runs / name, tmp_path / "one")


@pytest.mark.filterwarnings("ignore")  # Ray's own, by the dozen
def test_a_search_on_ray_is_the_search_of_one(runs: Path, model: Path, tmp_path: Path) -> None:
    """Two workers of a cluster that is started here."""
    import ray

    try:
        foreword.tune(
            model=str(model), data=DATA, text="text", label="label", out=tmp_path / "ray", quiet=True, train=TRAIN,
            tune={**SEARCH, "ray": "local", "ray_workers": 2},
        )  # fmt: skip
    finally:
        ray.shutdown()
    same_search(tmp_path / "ray", runs / "tuned")


def same_search(one: Path, other: Path) -> None:
    """Trials and members of two searches are the same."""
    ours, theirs = (json.loads((r / "tune.json").read_text()) for r in (one, other))
    assert ours["members"] == theirs["members"]
    for mine, reference in zip(ours["trials"], theirs["trials"], strict=True):
        assert {k: v for k, v in mine.items() if k not in ("seconds", "loss")} == {
            k: v for k, v in reference.items() if k not in ("seconds", "loss")
        }
        assert mine["loss"] == pytest.approx(reference["loss"], abs=1e-5)
    files = sorted(other.rglob(WEIGHTS))
    assert len(files) == len(theirs["members"])
    for file in files:
        mine, reference = (load_file(r / file.relative_to(other)) for r in (one, other))
        for name, tensor in reference.items():
            torch.testing.assert_close(mine[name], tensor, atol=2e-5, rtol=0)


# --- processes that end ---------------------------------------------------------------------------

EPOCHS = 40
LONG = {"train.epochs": str(EPOCHS), "train.batch_size": "4", "train.checkpoint_every": "1", "train.parallel": "ddp=2"}


class Pair:
    """Two processes of the command line, as torchrun or a cluster's own launcher would start them."""

    def __init__(self, model: Path, csv: Path, out: Path, *more: str, **keys: str) -> None:
        self.out, port = out, str(free_port())
        given = [f"{k}={v}" for k, v in {**LONG, **keys}.items()]
        command = [sys.executable, "-m", "foreword", "train", "--model", str(model), "--data", str(csv), "--text",
                   "Tweet text", "--label", "Label", "--out", str(out), *more, *given]  # fmt: skip
        shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = [
            subprocess.Popen(
                command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for r in range(2)
        ]  # fmt: skip

    def reach(self, step: int) -> None:
        """Waits until so many steps are done."""
        ends = time.monotonic() + 120
        while time.monotonic() < ends:
            if (self.out / "metrics.jsonl").is_file() and len(steps_so_far(self.out)) >= step:
                return
            assert self.processes[0].poll() is None, self.processes[0].communicate()[1]
            time.sleep(0.05)
        raise AssertionError("the steps did not come")

    def end(self, rank: int) -> tuple[int, str]:
        """Exit code and error output of a process."""
        _, err = self.processes[rank].communicate(timeout=120)
        return self.processes[rank].returncode, err

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *args: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def steps_so_far(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step"' in line]


@pytest.mark.parametrize(("signal_sent", "minutes"), [(signal.SIGKILL, "10"), (signal.SIGSTOP, "0.05")])
def test_a_lost_process_ends_the_run_and_any_number_of_processes_goes_on(
    model: Path, train_csv: Path, tmp_path: Path, signal_sent: signal.Signals, minutes: str
) -> None:
    """Killed it is noticed at once, stopped it is given up when a collective's time is over."""
    with Pair(model, train_csv, tmp_path / "run", **{"train.collective_minutes": minutes}) as pair:
        pair.reach(5)
        pair.processes[1].send_signal(signal_sent)
        code, err = pair.end(0)
    assert code == 2
    assert "another process ended or does not answer" in err
    assert "--resume" in err
    assert len(err.strip().splitlines()) == 3
    shared: dict[str, Any] = {"model": str(model), "data": str(train_csv), "text": "Tweet text", "label": "Label"}
    train = {"epochs": EPOCHS, "batch_size": 4}
    foreword.train(**shared, train=train, out=tmp_path / "run", resume=True, quiet=True)
    foreword.train(**shared, train=train, out=tmp_path / "whole", quiet=True)
    mine, reference = (load_file(tmp_path / r / WEIGHTS) for r in ("run", "whole"))
    for name, tensor in reference.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-4, rtol=0)


def test_torchrun_starts_us_and_an_error_of_all_is_said_once(model: Path, train_csv: Path, tmp_path: Path) -> None:
    """By the first process; torchrun then ends the others, which would say the same."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(free_port()), "-m", "foreword", "train", "--model", str(model), "--data", str(train_csv), "--text",
               "Tweet text", "--label", "Label", "--out", str(tmp_path / "run"), "train.parallel=tp=3"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("train.parallel=tp=3 is for 3 processes, and there are 2") == 1
    assert not (tmp_path / "run").exists()


# --- layouts and rows without processes -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "processes", "layout"),
    [
        ("", 1, Layout()),
        ("", 4, Layout(ddp=4)),
        ("tp=2", 8, Layout(ddp=4, tp=2)),
        ("tp=2, fsdp=4", 8, Layout(fsdp=4, tp=2)),
        ("fsdp=2,ddp=3", 6, Layout(ddp=3, fsdp=2)),
    ],
)
def test_a_layout_is_read_and_what_it_leaves_open_is_data_parallel(text: str, processes: int, layout: Layout) -> None:
    assert parse_layout(text, processes) == layout
    assert parse_layout(str(layout), processes) == layout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pp=2", "'pp=2' is no size"),
        ("tp", "'tp' is no size"),
        ("tp=0", "'tp=0' is no size"),
        ("tp=2,tp=2", "'tp=2' is no size"),
        ("tp=3", "for 3 processes, and there are 4"),
        ("ddp=2", "for 2 processes, and there are 4"),
    ],
)
def test_other_layouts_are_refused(text: str, said: str) -> None:
    with pytest.raises(ForewordError, match=said):
        parse_layout(text, 4)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 20))
def test_every_row_is_read_once_by_the_processes_of_one_reader(ddp: int, fsdp: int, tp: int, rows: int) -> None:
    layout, batch = Layout(ddp, fsdp, tp), list(range(rows))
    worlds = [World(layout, rank) for rank in range(layout.processes)]
    read = [row for w in worlds if w.slice == 0 for row in w.rows(batch)]
    assert sorted(read) == sorted(batch)
    assert all(w.rows(batch) == worlds[w.reader * tp].rows(batch) for w in worlds)
    assert [w.first for w in worlds].count(True) == 1


def test_alone_nothing_is_sent_or_changed() -> None:
    tensor = torch.ones(3)
    assert ALONE.add_up(tensor) is tensor
    assert ALONE.said_by_first("x") == "x"
    assert ALONE.joined_slices(tensor, 0) is tensor
