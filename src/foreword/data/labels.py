"""Classes and label words: from a column's values to the task."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from foreword.config import DataConfig
from foreword.data.template import default_template, require_columns
from foreword.data.template import parse as parse_template
from foreword.errors import ForewordError, nearest
from foreword.records import Table, Task

UNLABELLED = {"unlabeled", "unlabelled"}
"""Class names that say a row has no label (RAFT's test splits)."""
NO_LABEL = -1
"""The integer that says so (GLUE's test splits)."""
_INTEGER = re.compile(r"\s*-?\d+\s*")


def is_missing(value: Any) -> bool:
    """None, NaN, or text with nothing in it."""
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return True
    return isinstance(value, str) and not value.strip()


def build_task(config: DataConfig, train: Table) -> Task:
    """Decides classes, label words and template from the configuration and the training rows."""
    source = config.template if config.template is not None else default_template(config.text or "")
    template = parse_template(source)
    require_columns([f.column for f in template.fields], train.columns, train.origin)
    require_columns([config.label], train.columns, train.origin)
    classes: tuple[str, ...] = ()
    if _classifies(config, train):
        classes = _classes(config, train)
    separator = config.separator if not template.closing or not template.closing[-1].isspace() else ""
    words = _label_words(config.label_words, classes)
    names = tuple(train.class_names.get(config.label, config.classes))
    return Task(source, separator, config.label, classes, words, config.max_length, names)


def label_names(table: Table, column: str, classes: Sequence[str] = ()) -> list[str]:
    """The class name of each row. Integers become names where the source or ``classes`` names them.

    Raises:
        ForewordError: an empty label (with its row), an integer that names no class, or a
            split whose labels are hidden, which nothing can be trained or scored on.
    """
    declared = table.class_names.get(column)
    values = [row.get(column) for row in table.rows]
    _refuse_unlabelled(values, declared, table, column)
    missing = [n for n, v in zip(table.numbers, values, strict=True) if is_missing(v)]
    if missing:
        raise ForewordError(
            f"{len(missing)} rows have no label, the first is row {missing[0]}",
            f"{table.origin}, column '{column}'",
            "fill them in, or data.drop_incomplete=true",
        )
    return [_name(v, declared, classes, table, n) for v, n in zip(values, table.numbers, strict=True)]


def class_indices(names: Sequence[str], classes: Sequence[str], table: Table) -> list[int]:
    """Index of each name in ``classes``; an unknown name is an error with its row."""
    index = {c: i for i, c in enumerate(classes)}
    for name, number in zip(names, table.numbers, strict=True):
        if name not in index:
            raise ForewordError(
                f"label '{name}' is none of the classes",
                f"{table.origin}, row {number}",
                nearest(name, classes) or f"classes: {', '.join(classes[:20])}",
            )
    return [index[n] for n in names]


def drop_incomplete(table: Table, columns: Sequence[str]) -> Table:
    """The rows that have a value in all these columns."""
    keep = [i for i, row in enumerate(table.rows) if not any(is_missing(row.get(c)) for c in columns)]
    if not keep:
        raise ForewordError(
            "no rows are left after dropping incomplete ones",
            f"{table.origin}, columns {', '.join(columns)}",
            "fill in the columns",
        )
    return table.pick(keep)


def require_text(table: Table, columns: Sequence[str]) -> None:
    """Refuses rows whose input columns are empty, naming the first."""
    for row, number in zip(table.rows, table.numbers, strict=True):
        for column in columns:
            if is_missing(row.get(column)):
                raise ForewordError(
                    f"row {number} has nothing in column '{column}'",
                    table.origin,
                    "fill it in, or data.drop_incomplete=true",
                )


def _classifies(config: DataConfig, train: Table) -> bool:
    if config.task != "auto":
        return config.task == "classify"
    if config.classes or config.label_words or config.label in train.class_names:
        return True
    names = label_names(train, config.label)
    return len(set(names)) * 2 <= len(names)


def _classes(config: DataConfig, train: Table) -> tuple[str, ...]:
    place = f"{train.origin}, column '{config.label}'"
    declared = train.class_names.get(config.label, ())
    classes = config.classes or tuple(n for n in declared if n.lower() not in UNLABELLED)
    names = label_names(train, config.label, config.classes)
    if len(set(names)) < 2:
        raise ForewordError(
            f"only one class: '{names[0]}'",
            place,
            "give rows of at least two classes, or data.task=generate for free text",
        )
    if classes:
        class_indices(names, classes, train)
        return classes
    if str(NO_LABEL) in names:
        raise ForewordError(
            f"row {train.numbers[names.index(str(NO_LABEL))]} has the label -1, which often marks a row without one",
            place,
            "leave such rows out, or name all classes, as in data.classes=[-1, 0, 1]",
        )
    return tuple(sorted(set(names)))


def _label_words(given: Mapping[str, str], classes: tuple[str, ...]) -> tuple[str, ...]:
    for name in given:
        if name not in classes:
            raise ForewordError(
                f"label words for '{name}', which is no class",
                "key data.label_words",
                nearest(name, classes) or f"classes: {', '.join(classes[:20])}",
            )
    words = tuple(given.get(c, c.replace("_", " ")).strip() for c in classes)
    for i, word in enumerate(words):
        if not word or word in words[:i]:
            other = classes[words.index(word)]
            raise ForewordError(
                f"classes '{other}' and '{classes[i]}' have the same label words" if word else "empty label words",
                "key data.label_words",
                "give each class words of its own",
            )
    return words


def _name(value: Any, declared: Sequence[str] | None, classes: Sequence[str], table: Table, number: int) -> str:
    """The class name of one value.

    An integer is a position in the names, unless the names are themselves integers: ``2`` is the
    class "2" of "1", "2", "3". A ClassLabel's integers are positions always.
    """
    index = _as_index(value)
    if index is None:
        return str(value).strip()
    names = declared or classes
    by_position = declared is not None and not isinstance(value, str)
    if not names or (not by_position and any(_as_index(n) is not None for n in names)):
        return value.strip() if isinstance(value, str) else str(index)
    if not 0 <= index < len(names):
        raise ForewordError(
            f"label {index} names no class (there are {len(names)})",
            f"{table.origin}, row {number}",
            "labels count from 0 in the order of the class names",
        )
    return names[index]


def _as_index(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else None


def _refuse_unlabelled(values: Sequence[Any], declared: Sequence[str] | None, table: Table, column: str) -> None:
    def hidden(value: Any) -> bool:
        index = _as_index(value)
        if declared and index is not None and 0 <= index < len(declared):
            return declared[index].lower() in UNLABELLED
        if declared and index == NO_LABEL:
            return True
        return str(value).strip().lower() in UNLABELLED

    # Without a declaration a -1 among other values may be one of them (sentiment -1, 0, 1; sums).
    if all(is_missing(v) or hidden(v) or _as_index(v) == NO_LABEL for v in values):
        raise ForewordError(
            "this split has no real labels (its makers keep them hidden), so nothing can be learnt or scored on it",
            f"{table.origin}, column '{column}'",
            "score on a labelled split, data.eval_fraction=0.2 or data.folds=5",
        )
    first = next((n for n, v in zip(table.numbers, values, strict=True) if hidden(v) and not is_missing(v)), None)
    if first is not None:
        raise ForewordError(
            f"row {first} is marked as unlabelled", f"{table.origin}, column '{column}'", "leave such rows out"
        )
