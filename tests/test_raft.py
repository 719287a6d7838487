"""RAFT task folders: read as the hub's data set, trained on without further words, answered ID by ID."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import foreword
from conftest import Cli, three_lines, write_csv
from foreword.artifact.ensemble import write_ensemble
from foreword.artifact.sidecar import read_sidecar
from foreword.config import DataConfig
from foreword.data.raft import filled_in, read_task
from foreword.data.sources import read_table
from foreword.errors import ForewordError
from foreword.jobs.data import read_splits

CLASSES = ("ADE-related", "doesn't, really")
MANY = tuple(f"kind_{i:02}_of_77" for i in range(77))
FIRST = 50


def write_task(
    folder: Path,
    columns: Sequence[str] = ("Tweet text",),
    classes: Sequence[str] = CLASSES,
    labels: Sequence[str] = (),
    tests: Sequence[Sequence[str]] = (),
) -> Path:
    """A task folder like RAFT's: as many labelled rows as ``labels``, test rows with the IDs from 50 on."""
    folder.mkdir(parents=True, exist_ok=True)
    task = {"name": folder.name, "data_columns": [*columns, "ID"], "label_columns": {"Label": list(classes)}}
    (folder / "task.json").write_text(json.dumps({**task, "description": ""}))
    labels = labels or [classes[i % 2] for i in range(6)]
    rows = [[*(f"{c} {i} is late" for c in columns), label, str(i)] for i, label in enumerate(labels)]
    write_rows(folder / "train.csv", [*columns, "Label", "ID"], rows)
    tests = tests or [[f"{c} of the fox {i}" for c in columns] for i in range(5)]
    asked = [[*cells, str(FIRST + i)] for i, cells in enumerate(tests)]
    write_rows(folder / "test_unlabeled.csv", [*columns, "ID"], asked)
    return folder


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([columns, *rows])


def train(model: Path, out: Path, data: Path | str, **more: Any) -> Path:
    foreword.train(
        out=out, model=str(model), data=str(data), prompt={"virtual_tokens": 4}, train={"epochs": 1}, quiet=True, **more
    )
    return out


def answers(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8") as f:
        return list(csv.reader(f))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("raft") / "complaints")


@pytest.fixture(scope="module")
def trained(model_folder: Path, folder: Path) -> Path:
    return train(model_folder, folder.parent / "run", folder)


# --- the folder as rows ---------------------------------------------------------------------------


def test_the_folder_brings_classes_label_and_a_template(folder: Path) -> None:
    splits = read_splits(filled_in(DataConfig(path=str(folder))))
    assert splits.task.template == "Tweet text : {Tweet text} Label :"
    assert splits.task.classes == CLASSES
    assert (splits.task.label_column, len(splits.train)) == ("Label", 6)


def test_what_is_given_goes_over_what_the_folder_brings(folder: Path) -> None:
    data = DataConfig(path=str(folder), template="{Tweet text} =", label="Other")
    assert filled_in(data) == data
    assert filled_in(DataConfig(path=str(folder), text="Tweet text")).template is None
    assert filled_in(DataConfig()) == DataConfig()


def test_several_columns_stand_under_each_other_by_name(tmp_path: Path) -> None:
    task = read_task(write_task(tmp_path / "t", ("Title", "Abstract Note", "Url")))
    assert task.template == "Title : {Title}\nAbstract Note : {Abstract Note}\nUrl : {Url}\nLabel :"


def test_classes_that_no_training_row_shows_are_classes_all_the_same(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "banking", ("Query",), MANY, labels=MANY[10:40])
    splits = read_splits(filled_in(DataConfig(path=str(folder))))
    assert splits.task.classes == MANY
    assert splits.task.words[5] == "kind 05 of 77"


def test_labels_may_be_integers_as_on_the_hub_where_none_is_0(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", labels=["1", "2", "2"])
    table = read_splits(filled_in(DataConfig(path=str(folder)))).train
    assert table.class_names["Label"] == ("Unlabeled", *CLASSES)
    with pytest.raises(ForewordError, match="row 2 is marked as unlabelled"):
        read_splits(filled_in(DataConfig(path=str(write_task(tmp_path / "u", labels=["1", "0", "2"])))))


def test_an_empty_cell_is_read_as_a_dash_since_every_row_wants_an_answer(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", ("Title", "Abstract"), tests=[["a", ""], ["", " "]])
    rows = read_table(str(folder), "test").rows
    assert [(r["Title"], r["Abstract"]) for r in rows] == [("a", "-"), ("-", "-")]


def test_the_test_split_is_refused_for_scoring_since_its_labels_are_hidden(
    cli: Cli, trained: Path, folder: Path
) -> None:
    what, *_ = three_lines(cli("evaluate", trained, "--data", folder))
    assert "no real labels" in what


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "JSONDecodeError"),
        ('{"data_columns": ["a", "ID"]}', "label_columns"),
        ('{"data_columns": ["ID"], "label_columns": {"L": ["a", "b"]}}', "no columns"),
        ('{"data_columns": ["a"], "label_columns": {"L": ["a", "a"]}}', "two different classes"),
        ('{"data_columns": ["a"], "label_columns": {"L": ["a", "b"], "M": ["c", "d"]}}', "ValueError"),
    ],
)
def test_a_damaged_task_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(ForewordError, match="damaged task file") as e:
        read_task(tmp_path)
    assert said in e.value.what


def test_a_missing_file_or_column_is_named(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t")
    (folder / "train.csv").unlink()
    with pytest.raises(ForewordError, match=r"no train\.csv"):
        read_table(str(folder))
    with pytest.raises(ForewordError, match="no split 'validation'"):
        read_table(str(folder), "validation")
    write_csv(folder / "train.csv", [("a", "b")], ("Tweet", "Label"))
    with pytest.raises(ForewordError, match="no column 'Tweet text'"):
        read_table(str(folder))


# --- training and answering -----------------------------------------------------------------------


def test_every_id_gets_a_class_in_the_files_order(cli: Cli, trained: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.csv"
    code, said, err = cli("predict", "--raft", trained, folder, "--out", out)
    assert code == 0, err
    assert "5 rows written" in said
    header, *rows = answers(out)
    assert header == ["ID", "Label"]
    assert [i for i, _ in rows] == [str(FIRST + i) for i in range(5)]
    asked = [{"Tweet text": f"Tweet text of the fox {i}"} for i in range(5)]
    assert [label for _, label in rows] == [p.label for p in foreword.load(trained).predict(asked)]
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.csv"]


def test_training_at_the_command_line_needs_the_folder_alone(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "multi", ("Title", "Abstract"), tests=[["a", ""], ["b", "word " * 900]])
    few = ["--model", model_folder, "--data", folder]
    code, said, err = cli("preview", *few)
    assert code == 0, err
    assert "Abstract : {Abstract}" in said
    run = tmp_path / "run"
    code, _, err = cli("train", *few, "--out", run, "train.epochs=1", "prompt.virtual_tokens=4", "data.folds=2")
    assert code == 0, err
    assert "template" in (run / "recipe.yaml").read_text()
    assert cli("predict", "--raft", run, folder, "--out", tmp_path / "p.csv")[0] == 0
    assert [row[0] for row in answers(tmp_path / "p.csv")] == ["ID", "50", "51"]


def test_77_classes_of_which_few_are_shown(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "banking", ("Query",), MANY, labels=MANY[10:40] * 2)
    run = train(model_folder, tmp_path / "run", folder)
    sidecar = read_sidecar(run)
    assert sidecar is not None
    assert sidecar.task.classes == MANY
    assert cli("predict", "--raft", run, folder, "--out", tmp_path / "p.csv")[0] == 0
    assert {row[1] for row in answers(tmp_path / "p.csv")[1:]} <= set(MANY)
    # Trained on the rows alone it knows the classes that they show, which are too few.
    alone = train(
        model_folder, tmp_path / "alone", folder / "train.csv", text="Query",
        label="Label", template="Query : {Query} Label :",
    )  # fmt: skip
    refused = three_lines(cli("predict", "--raft", alone, folder, "--out", tmp_path / "q.csv"))
    assert "no class 'kind_00_of_77': it knows 30 classes, the task banking has 77" in refused[0]
    assert not (tmp_path / "q.csv").exists()


def test_an_ensemble_answers_too(cli: Cli, trained: Path, folder: Path, tmp_path: Path) -> None:
    write_ensemble(tmp_path / "both", [trained, trained])
    assert cli("predict", "--raft", trained, folder, "--out", tmp_path / "one.csv")[0] == 0
    assert cli("predict", "--raft", tmp_path / "both", folder, "--out", tmp_path / "two.csv")[0] == 0
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


@pytest.mark.parametrize(
    "classes, expected",
    [
        (CLASSES[::-1], CLASSES[::-1]),
        (("ade-related", "doesn't,  Really"), CLASSES),
        (("1", "2"), CLASSES),
        (("0", "1"), None),  # as positions they may be meant either way
        (("ADE-related", "other"), None),
        (("ADE-related",), None),
        ((), None),
    ],
)
def test_the_runs_classes_are_the_tasks(
    folder: Path, classes: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    task = read_task(folder)
    if expected is None:
        with pytest.raises(ForewordError, match="the run has"):
            task.spelling(classes, "run")
    else:
        assert tuple(task.spelling(classes, "run").values()) == expected


def test_names_are_written_as_the_task_spells_them(cli: Cli, model_folder: Path, folder: Path, tmp_path: Path) -> None:
    rows = [(f"late {i}", name) for i in range(3) for name in ("ade-RELATED", "doesn't,_really")]
    data = write_csv(tmp_path / "rows.csv", rows)
    run = train(model_folder, tmp_path / "run", data, text="Tweet text", label="Label")
    assert cli("predict", "--raft", run, folder, "--out", tmp_path / "p.csv")[0] == 0
    assert {row[1] for row in answers(tmp_path / "p.csv")[1:]} <= set(CLASSES)


@pytest.mark.parametrize(
    "ids, said", [(["50", "51", "50"], "rows 1 and 3 have the ID 50"), (["50", "", "52"], "row 2 has no ID")]
)
def test_ids_that_are_missing_or_stand_twice_are_refused(
    cli: Cli, trained: Path, tmp_path: Path, ids: list[str], said: str
) -> None:
    folder = write_task(tmp_path / "t")
    write_rows(folder / "test_unlabeled.csv", ["Tweet text", "ID"], [["late", i] for i in ids])
    refused = three_lines(cli("predict", "--raft", trained, folder, "--out", tmp_path / "p.csv"))
    assert said in refused[0]
    assert not (tmp_path / "p.csv").exists()


def test_answers_are_held_against_the_ids(folder: Path) -> None:
    task = read_task(folder)
    asked = [{"ID": "50"}, {"ID": "51"}]
    good = [{"ID": "50", "Label": CLASSES[0]}, {"ID": "51", "Label": CLASSES[1]}]
    task.check_answers(good, asked, "p.csv")
    for bad in (good[:1], [*good, good[0]], good[::-1], [good[0], {"ID": "51", "Label": "else"}]):
        with pytest.raises(ForewordError):
            task.check_answers(bad, asked, "p.csv")


def test_what_is_no_task_folder_or_does_not_go_with_raft_is_refused(
    cli: Cli, trained: Path, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "p.csv"]
    refusals = {
        "no task.json": ["--raft", trained, tmp_path / "empty", *out],
        "RAFT takes a .csv": ["--raft", trained, folder, "--out", tmp_path / "p.jsonl"],
        "--split train": ["--raft", trained, folder, "--split", "train", *out],
        "--raft and --prompts": ["--raft", "--prompts", trained.parent, folder, "--model", "m", *out],
        "a folder, not a file": [trained, tmp_path / "empty", *out],
    }
    for said, args in refusals.items():
        assert said in three_lines(cli("predict", *args))[0]
    assert "task.json" in three_lines(cli("predict", trained, tmp_path / "empty", *out))[2]
    rows = [("late", f"an answer of its own {i}") for i in range(5)]
    writer = train(
        tmp_path_model(trained), tmp_path / "writer", write_csv(tmp_path / "w.csv", rows), text="Tweet text",
        label="Label",
    )  # fmt: skip
    assert "0 classes" in three_lines(cli("predict", "--raft", writer, folder, *out))[0]


def tmp_path_model(run: Path) -> Path:
    """The model folder that a run was trained on."""
    sidecar = read_sidecar(run)
    assert sidecar is not None
    return Path(sidecar.backbone["name"])


def test_a_stopped_job_goes_on_and_another_is_refused(cli: Cli, trained: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    assert cli("predict", "--raft", trained, folder, "--out", out)[0] == 0
    whole = out.read_bytes()
    (tmp_path / ".p.csv.partial").write_bytes(whole)
    assert "--resume" in three_lines(cli("predict", "--raft", trained, folder, "--out", out))[2]
    (tmp_path / ".p.csv.partial.json").write_text("{}")
    refused = three_lines(cli("predict", "--raft", trained, folder, "--out", out, "--resume"))
    assert "the same job" in refused[0]
