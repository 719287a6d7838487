"""Dividing rows: what is held out, and what the score's protocol says about it."""

from __future__ import annotations

from typing import Any

import pytest

from foreword.config import DataConfig
from foreword.errors import ForewordError
from foreword.jobs.data import read_labelled, read_splits
from foreword.records import Table

ROWS = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(20)]


def splits(eval_rows: list[dict[str, Any]] | None = None, **changes: Any) -> Any:
    return read_splits(DataConfig(path="memory", text="text", label="label", **changes), ROWS, eval_rows)


def texts(table: Table | None) -> set[str]:
    return {str(r["text"]) for r in table.rows} if table else set()


def test_held_out_validation_and_training_rows_are_three_separate_sets() -> None:
    found = splits(eval_fraction=0.2, validation_fraction=0.25)
    parts = [texts(found.train), texts(found.validation), texts(found.held_out)]
    assert [len(p) for p in parts] == [12, 4, 4]
    assert set().union(*parts) == {r["text"] for r in ROWS}
    assert "4 rows held out" in found.protocol


def test_the_protocol_says_when_held_out_inputs_were_also_trained_on() -> None:
    assert "also trained on" not in splits(eval_fraction=0.2).protocol
    rows = [{"text": f"row {i % 2}", "label": f"target {i}"} for i in range(20)]
    config = DataConfig(path="memory", text="text", label="label", task="generate", eval_fraction=0.2)
    assert read_splits(config, rows).protocol.endswith(", 4 of which were also trained on")


def test_validation_rows_stand_in_no_fold() -> None:
    found = splits(folds=4, validation_fraction=0.2)
    for keep, out in found.folds:
        assert sorted(keep + out) == list(range(len(found.train)))
    assert not texts(found.validation) & texts(found.train)


def test_more_folds_than_rows_are_refused() -> None:
    with pytest.raises(ForewordError, match="21 folds of 20 rows"):
        splits(folds=21)


def test_rows_that_were_also_trained_on_are_counted_in_the_protocol() -> None:
    fresh = [{"text": "new", "label": "a"}, {"text": "newer", "label": "b"}]
    assert "also trained on" not in splits(fresh).protocol
    assert "all 3 rows" in splits([*fresh, ROWS[0]]).protocol
    assert splits([*fresh, ROWS[0]]).protocol.endswith(", 1 of which were also trained on")


def test_integer_labels_keep_their_meaning_when_a_hidden_class_comes_first() -> None:
    names = ("Unlabeled", "complaint", "no complaint")
    rows = tuple({"text": str(i), "label": 1 + i % 2} for i in range(4))
    table = Table(rows, ("text", "label"), "hub", (1, 2, 3, 4), {"label": names})
    from foreword.data.labels import build_task, label_names

    task = build_task(DataConfig(text="text", label="label"), table)
    assert task.classes == names[1:]
    export = read_labelled([{"text": "x", "label": "1"}, {"text": "y", "label": "2"}], "test", task)
    assert label_names(export, "label", task.names) == ["complaint", "no complaint"]
