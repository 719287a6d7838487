"""Classes and label words: from a column's values to the task, and what is refused on the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from foreword.config import DataConfig
from foreword.data.labels import build_task, class_indices, drop_incomplete, is_missing, label_names, require_text
from foreword.data.sources import rows_table
from foreword.errors import ForewordError
from foreword.records import Table, Task

RAFT = ("Unlabeled", "complaint", "no complaint")


def table_of(*labels: Any, names: tuple[str, ...] = ()) -> Table:
    table = rows_table([{"text": f"text {i}", "label": label} for i, label in enumerate(labels)], "t.csv")
    return Table(table.rows, table.columns, table.origin, table.numbers, {"label": names} if names else {})


def task_of(table: Table, **data: Any) -> Task:
    return build_task(DataConfig(path="t.csv", text="text", label="label", **data), table)


def names_of(table: Table, task: Task) -> list[str]:
    return label_names(table, task.label_column, task.classes)


def refused(table: Table, **data: Any) -> ForewordError:
    with pytest.raises(ForewordError) as e:
        task_of(table, **data)
    return e.value


# From values to class names


def test_text_labels_are_the_classes_in_alphabetical_order() -> None:
    table = table_of("b", "a", " b ", "a")
    task = task_of(table)
    assert task.classes == task.words == ("a", "b")
    assert names_of(table, task) == ["b", "a", "b", "a"]
    assert class_indices(names_of(table, task), task.classes, table) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "labels", [(2, 1, 3, 1, 2, 3), ("2", "1", "3", "1", " 2", "3 "), (2.0, 1.0, 3.0, 1.0, 2.0, 3.0)]
)
def test_integers_without_names_are_classes_by_their_value(labels: tuple[Any, ...]) -> None:
    table = table_of(*labels)
    task = task_of(table)
    assert task.classes == ("1", "2", "3")
    assert names_of(table, task) == ["2", "1", "3", "1", "2", "3"]


def test_integer_classes_take_no_other_integer_as_a_position() -> None:
    task = task_of(table_of(1, 2, 3, 1, 2, 3))
    held_out = table_of(1, 0)
    with pytest.raises(ForewordError, match="label '0' is none of the classes"):
        class_indices(names_of(held_out, task), task.classes, held_out)


def test_a_class_labels_integers_are_positions_in_its_names() -> None:
    table = table_of(1, 2, 1, 2, names=RAFT)
    task = task_of(table)
    assert task.classes == ("complaint", "no complaint"), "'Unlabeled' is no class"
    assert names_of(table, task) == ["complaint", "no complaint"] * 2


def test_a_class_labels_names_may_be_integers_themselves() -> None:
    table = table_of(0, 1, 2, 0, names=("1", "2", "3"))
    assert names_of(table, task_of(table)) == ["1", "2", "3", "1"]


@pytest.mark.parametrize("labels", [(0, 1, 1), ("0", "1", "1"), (0.0, 1.0, 1.0), tuple(np.array([0, 1, 1]))])
def test_given_classes_name_integers_in_their_order(labels: tuple[Any, ...]) -> None:
    table = table_of(*labels)
    task = task_of(table, classes=("no", "yes"))
    assert task.classes == ("no", "yes")
    assert names_of(table, task) == ["no", "yes", "yes"]


def test_given_classes_may_be_the_names_themselves() -> None:
    table = table_of("yes", "no", "yes")
    assert names_of(table, task_of(table, classes=("no", "yes"))) == ["yes", "no", "yes"]


def test_truth_values_are_classes() -> None:
    assert task_of(table_of(True, False, True, False)).classes == ("False", "True")


def test_an_integer_beyond_the_names_is_refused_with_its_row() -> None:
    error = refused(table_of(0, 1, 2), classes=("no", "yes"))
    assert error.what == "label 2 names no class (there are 2)"
    assert error.where == "t.csv, row 3"
    assert refused(table_of(0, -2, 1), classes=("no", "yes")).where == "t.csv, row 2"


def test_an_unknown_class_suggests_the_nearest() -> None:
    error = refused(table_of("complaint", "praise", "complant"), classes=("complaint", "praise"))
    assert (error.what, error.where) == ("label 'complant' is none of the classes", "t.csv, row 3")
    assert error.fix == "did you mean 'complaint'?"
    assert refused(table_of("a", "b", "zzz"), classes=("a", "b")).fix == "classes: a, b"


@pytest.mark.parametrize("label", ["--5", "-", "5-", "1 2", "1x"])
def test_what_only_looks_like_a_number_is_text(label: str) -> None:
    assert label in task_of(table_of(label, "a", label, "a")).classes


# Label words


def test_label_words_are_the_names_with_spaces_unless_given() -> None:
    task = task_of(table_of("no_complaint", "complaint"), label_words={"complaint": " angry "})
    assert dict(zip(task.classes, task.words, strict=True)) == {"complaint": "angry", "no_complaint": "no complaint"}


def test_label_words_for_no_class_suggest_the_nearest() -> None:
    error = refused(table_of("complaint", "praise"), label_words={"complant": "x"})
    assert "'complant'" in error.what
    assert error.fix == "did you mean 'complaint'?"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ({"a": "same", "b": "same"}, "classes 'a' and 'b' have the same label words"),
        ({"a": "b"}, "classes 'a' and 'b' have the same label words"),
        ({"a": " "}, "empty label words"),
    ],
)
def test_every_class_needs_words_of_its_own(words: dict[str, str], what: str) -> None:
    error = refused(table_of("a", "b"), label_words=words)
    assert (error.what, error.where) == (what, "key data.label_words")


def test_the_separator_gives_way_to_a_line_end_in_the_template() -> None:
    table = table_of("a", "b", "a", "b")
    assert task_of(table).separator == " "
    assert task_of(table, template="{text}\nLabel:\n").separator == ""
    assert task_of(table, template="{text}").separator == " "


# Rows without a label


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((0, 0, 0), RAFT),
        (("Unlabeled", "unlabelled", " UNLABELED "), ()),
        ((-1, -1, -1), ()),
        (("-1", "-1"), ()),
        ((-1, -1), ("neg", "pos")),
        ((None, math.nan, ""), ()),
    ],
)
def test_a_split_without_real_labels_is_refused_with_the_reason(
    labels: tuple[Any, ...], names: tuple[str, ...]
) -> None:
    table = table_of(*labels, names=names)
    with pytest.raises(ForewordError, match="its makers keep them hidden") as e:
        label_names(table, "label", ("complaint", "no complaint"))
    assert e.value.where == "t.csv, column 'label'"
    assert "hidden" in refused(table).what


@pytest.mark.parametrize(("labels", "names"), [((1, 0, 2), RAFT), (("a", "Unlabeled", "b"), ()), ((0, -1), ("a", "b"))])
def test_one_row_marked_as_unlabelled_is_named(labels: tuple[Any, ...], names: tuple[str, ...]) -> None:
    assert refused(table_of(*labels, names=names)).what == "row 2 is marked as unlabelled"


def test_minus_one_among_other_integers_must_be_named_to_be_a_class() -> None:
    table = table_of(1, 0, -1, 1, 0, -1)
    error = refused(table)
    assert error.what.startswith("row 3 has the label -1")
    assert "data.classes=[-1, 0, 1]" in error.fix
    task = task_of(table, classes=("-1", "0", "1"))
    assert names_of(table, task) == ["1", "0", "-1"] * 2


def test_minus_one_is_an_answer_like_any_other_in_free_text() -> None:
    table = table_of(-1, 3, "-1", "2 - 3")
    assert names_of(table, task_of(table, task="generate")) == ["-1", "3", "-1", "2 - 3"]


@pytest.mark.parametrize("empty", [None, math.nan, np.float32("nan"), "", "  ", "\t\n"])
def test_an_empty_label_is_named_by_its_row(empty: Any) -> None:
    error = refused(table_of("a", "b", empty, "a", empty))
    assert error.what == "2 rows have no label, the first is row 3"
    assert error.where == "t.csv, column 'label'"


@pytest.mark.parametrize("value", [0, 0.0, False, "0", " x "])
def test_zero_and_false_are_values(value: Any) -> None:
    assert not is_missing(value)


def test_an_empty_input_is_named_by_its_row_and_column() -> None:
    table = rows_table([{"text": "a", "more": "b"}, {"text": "a", "more": None}], "t.csv")
    require_text(table, ["text"])
    with pytest.raises(ForewordError, match="row 2 has nothing in column 'more'"):
        require_text(table, ["text", "more"])


def test_incomplete_rows_are_dropped_and_the_others_keep_their_numbers() -> None:
    table = rows_table([{"text": "a", "label": ""}, {"text": "b", "label": "x"}, {"text": math.nan, "label": "x"}])
    left = drop_incomplete(table, ["text", "label"])
    assert left.numbers == (2,)
    assert left.rows == ({"text": "b", "label": "x"},)


def test_no_rows_left_is_an_error() -> None:
    table = table_of("", None)
    with pytest.raises(ForewordError, match="no rows are left") as e:
        drop_incomplete(table, ["text", "label"])
    assert e.value.where == "t.csv, columns text, label"


# One class, and which kind of task it is


@pytest.mark.parametrize(
    ("table", "data"),
    [
        (table_of("a", "a", "a"), {}),
        (table_of("a", "a"), {"classes": ("a", "b")}),
        (table_of(1, 1), {"classes": ("a", "b")}),
        (table_of(1, 1, names=RAFT), {}),
        (table_of("a", "a"), {"classes": ("a",)}),
        (table_of("a"), {"task": "classify"}),
    ],
)
def test_rows_of_one_class_are_refused(table: Table, data: dict[str, Any]) -> None:
    error = refused(table, **data)
    assert error.what.startswith("only one class")
    assert error.where == "t.csv, column 'label'"


@pytest.mark.parametrize(
    ("table", "data", "classifies"),
    [
        (table_of("a", "b", "a", "b"), {}, True),  # labels repeat
        (table_of("a", "b", "c"), {}, False),  # they do not
        (table_of("a", "b", "c", "a"), {}, False),
        (table_of("a", "b"), {"classes": ("a", "b")}, True),
        (table_of("a", "b"), {"label_words": {"a": "x"}}, True),
        (table_of(0, 1, names=("a", "b")), {}, True),
        (table_of("a", "b"), {"task": "classify"}, True),
        (table_of("a", "b", "a", "b"), {"task": "generate"}, False),
    ],
)
def test_whether_targets_are_classes_or_free_text(table: Table, data: dict[str, Any], classifies: bool) -> None:
    task = task_of(table, **data)
    assert task.classifies == classifies
    assert bool(task.words) == classifies


def test_a_missing_label_or_template_column_is_named() -> None:
    table = rows_table([{"txt": "a", "Label": "x"}], "t.csv")
    assert refused(table).what == "no column 'text'"
    error = refused(table, template="{txt} :")
    assert (error.what, error.fix) == ("no column 'label'", "did you mean 'Label'?")
