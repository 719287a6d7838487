"""The command line as a contract: forms, files, exit codes, three-line errors, kill and resume."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROWS, Cli, three_lines, write_csv

QUICK = ["prompt.virtual_tokens=4", "train.epochs=2", "train.lr=0.05"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A finished run, scored on held-out rows."""
    folder = tmp_path_factory.mktemp("done")
    write_csv(folder / "train.csv", ROWS)
    write_csv(folder / "test.csv", ROWS[:6])
    subprocess.run(
        [sys.executable, "-m", "foreword", *train_args(model_folder, folder / "train.csv", folder / "run"),
         "--eval-data", folder / "test.csv", *QUICK],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def train_args(model: Path, data: Path, out: Path) -> list[object]:
    return ["train", "--model", model, "--data", data, "--text", "Tweet text", "--label", "Label", "--out", out]


def test_a_run_folder_is_an_adapter_folder(done: Path) -> None:
    files = {p.name for p in (done / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "foreword.json", "README.md"} <= files
    assert {"recipe.yaml", "metrics.jsonl", "checkpoint.safetensors"} <= files
    *steps, end = [json.loads(line) for line in (done / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert end["event"] == "end"
    assert end["engine"] == "eager"
    assert end["peak_memory_mb"] is None or end["peak_memory_mb"] >= 0
    sidecar = json.loads((done / "run" / "foreword.json").read_text())
    assert sidecar["task"]["template"] == "{Tweet text} Label :"
    assert sidecar["scores"]["n"] == 6
    assert sidecar["training"]["rows"] == 10


def test_evaluate_writes_scores_with_intervals_and_baselines(cli: Cli, done: Path, tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    code, out, err = cli("evaluate", done / "run", "--data", done / "test.csv", "--json", target)
    assert code == 0, err
    scores = json.loads(target.read_text())
    assert scores["n"] == 6
    for key in ("accuracy", "macro_f1", "loss", "perplexity", "calibration_error"):
        low, high = scores["intervals"][key]
        assert low <= scores[key] <= high or key == "calibration_error"
    assert scores["perplexity"] == pytest.approx(2.718281828 ** scores["loss"], rel=1e-5)
    assert set(scores["baselines"]) == {"zero_shot", "majority"}
    assert set(scores["per_class"]) == {"complaint", "no complaint"}
    assert sum(map(sum, scores["confusion"]["counts"])) == 6
    stored = json.loads((done / "run" / "foreword.json").read_text())["scores"]
    assert stored["accuracy"] == scores["accuracy"]
    assert stored["loss"] == pytest.approx(scores["loss"], abs=1e-6)
    assert all(len(line) <= 80 for line in out.splitlines() if "rows of" not in line and "written" not in line), out


def test_predict_keeps_the_input_columns_and_adds_label_and_probabilities(cli: Cli, done: Path, tmp_path: Path) -> None:
    code, _, err = cli("predict", done / "run", done / "test.csv", "--out", tmp_path / "p.csv")
    assert code == 0, err
    with (tmp_path / "p.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["Tweet text", "Label", "label", "p(complaint)", "p(no complaint)"]
    assert [r["Tweet text"] for r in rows] == [t for t, _ in ROWS[:6]]
    for row in rows:
        p = {c: float(row[f"p({c})"]) for c in ("complaint", "no complaint")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(p, key=lambda c: p[c])


def test_generate_streams_text(cli: Cli, done: Path) -> None:
    code, out, err = cli("generate", done / "run", "my parcel is late", "--max-new-tokens", 5)
    assert code == 0, err
    assert out.endswith("\n")


def test_preview_shows_tokens_and_where_the_loss_falls(cli: Cli, done: Path, model_folder: Path) -> None:
    args = ["--model", model_folder, "--data", done / "train.csv", "--text", "Tweet text", "--label", "Label"]
    code, out, err = cli("preview", *args, "--rows", 1)
    assert code == 0, err
    loss = next(line for line in out.splitlines() if line.startswith("loss on"))
    assert loss.replace("|", "").endswith(" complaint<end>")
    assert ROWS[0][0] in out.replace("|", "")


def test_show_and_recipes(cli: Cli, done: Path, tmp_path: Path) -> None:
    code, out, _ = cli("show", done / "run")
    assert code == 0
    assert "zero-shot" in out
    assert "{Tweet text} Label :" in out
    assert "twitter-complaints" in cli("recipes", "list")[1]
    shown = cli("recipes", "show", "twitter-complaints")[1]
    assert "virtual_tokens: 8" in shown
    copy = tmp_path / "mine.yaml"
    assert cli("recipes", "copy", "twitter-complaints", copy)[0] == 0
    assert "bloomz-560m" in copy.read_text()
    three_lines(cli("recipes", "copy", "twitter-complaints", copy))
    three_lines(cli("recipes", "show", "twiter"))


def test_recipe_file_then_command_line(cli: Cli, done: Path, model_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{id: {model_folder}}}\n"
        f"data: {{path: {done / 'train.csv'}, text: Tweet text, label: Label}}\n"
        "prompt: {virtual_tokens: 3, init: vocabulary+classes:2}\ntrain: {epochs: 9, lr: 1e-2}\n"
    )
    code, _, err = cli("train", recipe, "--out", tmp_path / "run", "train.epochs=1", "data.folds=2")
    assert code == 0, err
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "epochs: 1\n" in text
    assert "lr: 0.01\n" in text
    scores = json.loads((tmp_path / "run" / "foreword.json").read_text())["scores"]
    assert scores["n"] == 10
    assert "2-fold cross-validation" in scores["protocol"]


def test_free_text_targets_train_and_score(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    rows = [(f"word {i}", f"the fox {i}") for i in range(6)]
    data = write_csv(tmp_path / "d.csv", rows)
    args = train_args(model_folder, data, tmp_path / "run")
    code, _, err = cli(*args, *QUICK, "data.eval_fraction=0.5", "data.validation_fraction=0.3", "train.select=loss")
    assert code == 0, err
    scores = json.loads((tmp_path / "run" / "foreword.json").read_text())["scores"]
    assert scores["n"] == 3
    assert "exact_match" in scores
    assert "majority" not in scores["baselines"]


BAD = {
    "missing column": (["--text", "Twet text"], "no column 'Twet text'", "Tweet text"),
    "no such file": (["--data", "trian.csv"], "no such file", ""),
    "unknown key": (["train.lrr=1"], "unknown key", "train.lr"),
    "wrong type": (["train.epochs=many"], "not a whole number", ""),
    "unknown initialiser": (["prompt.init=txet"], "unknown initialiser", "text"),
    "no virtual tokens": (["prompt.virtual_tokens=-1"], "must not be negative", ""),
    "nothing says how many": (["prompt.virtual_tokens=0", "prompt.init=random"], "how many virtual tokens", "number"),
    "unknown method": (["prompt.method=prefix"], "unknown method", "prefix-tuning"),
    "two placements": (["data.template={soft:2}{Tweet text} :", "prompt.placement=end"], "says it too", "one of them"),
    "a prefix in the text": (
        ["prompt.method=prefix-tuning", "prompt.placement=end"],
        "before everything",
        "prompt-tuning",
    ),
    "beyond the window": (["prompt.virtual_tokens=600"], "leave no room", "below 511"),
    "unknown optimiser": (["train.optimizer=adamm"], "unknown optimiser", "adam"),
    "unknown recipe": (["twiter-complaints"], "no recipe", "twitter-complaints"),
    "no such model": (["--model", "./nowhere"], "no such model folder", ""),
    "row cannot fit": (["data.max_length=3"], "does not fit", "shorten"),
    "contradiction": (["data.folds=2", "data.eval_fraction=0.1"], "exclude each other", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_three_lines_and_leaves_nothing(
    cli: Cli, train_csv: Path, model_folder: Path, tmp_path: Path, case: str
) -> None:
    extra, what, fix = BAD[case]
    out = tmp_path / "new"
    lines = three_lines(cli(*train_args(model_folder, train_csv, out), *extra))
    assert what in lines[0]
    assert fix in lines[2]
    assert not out.exists(), "a refused run leaves no folder"


BAD_FILES = {
    "empty": ("", "there are no rows"),
    "header only": ("Tweet text,Label\n", "there are no rows"),
    "one class": ("Tweet text,Label\na,x\nb,x\nc,x\n", "only one class"),
    "no label": ("Tweet text,Label\na,x\nb,\n", "have no label, the first is row 2"),
    "unlabelled": ("Tweet text,Label\na,Unlabeled\nb,Unlabeled\n", "no real labels"),
    "malformed": ('Tweet text,Label\n"a" b,x\n', "malformed CSV"),
    "ragged": ("Tweet text,Label\na,x,3\n", "3 fields where the header has 2"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_three_lines(cli: Cli, model_folder: Path, tmp_path: Path, case: str) -> None:
    text, what = BAD_FILES[case]
    data = tmp_path / "bad.csv"
    data.write_text(text)
    lines = three_lines(cli(*train_args(model_folder, data, tmp_path / "new"), "data.task=classify"))
    assert what in lines[0]
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_or_not_empty_is_left_alone(
    cli: Cli, train_csv: Path, model_folder: Path, done: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in (done / "run").iterdir() if p.is_file()}
    lines = three_lines(cli(*train_args(model_folder, train_csv, done / "run")))
    assert "not empty" in lines[0]
    assert before == {p: p.read_bytes() for p in (done / "run").iterdir() if p.is_file()}
    lines = three_lines(cli("train", "--resume", "--out", done / "run", "train.lr=9"))
    assert "train.lr" in lines[0]


def test_another_backbone_is_refused_naming_both(cli: Cli, done: Path, tmp_path: Path, model_folder: Path) -> None:
    import tiny

    other = tiny.save(tmp_path / "other", seed=1)
    lines = three_lines(cli("evaluate", done / "run", "--data", done / "test.csv", "--model", other))
    assert str(other) in lines[1]
    assert str(model_folder) in lines[1]
    args = ["evaluate", done / "run", "--data", done / "test.csv", "--model", other, "--force"]
    assert cli(*args)[0] == 0
    gpt2 = tiny.save(tmp_path / "gpt2", "gpt2")
    assert "model_type is gpt2" in three_lines(cli("generate", done / "run", "x", "--model", gpt2))[0]
    assert "no adapter in this folder" in three_lines(cli("show", gpt2))[0]


def test_a_missing_label_column_at_scoring_suggests_the_nearest(cli: Cli, done: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ROWS, header=("Tweet text", "Lable"))
    lines = three_lines(cli("evaluate", done / "run", "--data", tmp_path / "t.csv"))
    assert "Lable" in lines[2]


@pytest.mark.parametrize("words", [["train", "--help"], ["--version"]])
def test_help_is_quick_and_loads_no_torch(words: list[str]) -> None:
    code = f"import sys; sys.argv={['foreword', *words]}\nfrom foreword.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False False")


def test_versions_are_what_a_run_records(cli: Cli, done: Path) -> None:
    code, out, _ = cli("--version")
    assert code == 0
    recorded = json.loads((done / "run" / "foreword.json").read_text())["versions"]
    assert dict(line.split(" ") for line in out.splitlines()) == recorded


def test_every_key_has_help(cli: Cli) -> None:
    code, out, _ = cli("train", "--help-keys")
    assert code == 0
    assert "train.lr=0.0\n    Learning rate" in out


def test_a_population_keeps_its_best_and_every_member_is_an_adapter(
    cli: Cli, train_csv: Path, model_folder: Path, tmp_path: Path
) -> None:
    lists = ["train.lr=[0.05,0.001]", "prompt.population=2", "data.validation_fraction=0.3", "train.select=loss"]
    code, out, err = cli(*train_args(model_folder, train_csv, tmp_path / "run"), *QUICK[:2], *lists)
    assert code == 0, err
    assert "population of 4 soft prompts" in out
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best: dict[int, float] = {}
    for event in events:
        if event["event"] == "validation":
            best[event["member"]] = min(event["loss"], best.get(event["member"], event["loss"]))
    assert len(best) == 4
    winner = min(best, key=lambda k: best[k])
    assert f"member {winner:02}" in next(line for line in out.splitlines() if "(kept)" in line)
    kept = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    folders = sorted((tmp_path / "run" / "members").iterdir())
    assert [f.name for f in folders] == ["00", "01", "02", "03"]
    assert (folders[winner] / "adapter_model.safetensors").read_bytes() == kept
    said = json.loads((folders[3] / "foreword.json").read_text())["training"]
    assert (said["lr"], said["seed"], said["population"]) == (0.001, 1, 4)
    assert cli("generate", folders[3], "my parcel")[0] == 0
    three_lines(cli(*train_args(model_folder, train_csv, tmp_path / "x"), "train.seed=[0,1]", "prompt.population=2"))
    three_lines(cli(*train_args(model_folder, train_csv, tmp_path / "x"), "train.engine=graph", "model.device=cpu"))
    both = ["train.recompute=true", "train.engine=compile"]
    three_lines(cli(*train_args(model_folder, train_csv, tmp_path / "x"), *both))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_and_resumed_is_uninterrupted_byte_for_byte(
    cli: Cli, train_csv: Path, model_folder: Path, tmp_path: Path, how: signal.Signals
) -> None:
    slow = ["prompt.virtual_tokens=4", "train.epochs=60", "train.batch_size=1", "data.eval_fraction=0.3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli(*train_args(model_folder, train_csv, whole), *slow)[0] == 0

    command = [sys.executable, "-m", "foreword", *map(str, train_args(model_folder, train_csv, cut)), *slow]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while not (cut / "checkpoint.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=240)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), err
    assert not (cut / "adapter_config.json").exists(), "the run must not have been over yet"
    if how == signal.SIGINT:
        assert b"--resume" in out
    lines = three_lines(cli("show", cut))
    assert "--resume" in lines[2]

    code, said, err_text = cli("train", "--resume", "--out", cut)
    assert code == 0, err_text
    assert "resumed after step" in said
    assert (cut / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert metrics(cut) == metrics(whole)


def metrics(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    measured = ("seconds", "peak_memory_mb")
    return [{k: v for k, v in json.loads(line).items() if k not in measured} for line in lines]


def test_an_adapter_whose_backbone_has_moved_says_how_to_name_it(cli: Cli, done: Path, tmp_path: Path) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(done / "run", moved)
    sidecar = json.loads((moved / "foreword.json").read_text())
    sidecar["backbone"]["name"] = "./gone"
    (moved / "foreword.json").write_text(json.dumps(sidecar))
    lines = three_lines(cli("generate", moved, "x"))
    assert "--model" in lines[2]
    assert str(moved) in lines[1]
