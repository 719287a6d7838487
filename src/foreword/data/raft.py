"""RAFT task folders: ``task.json``, 50 labelled rows in ``train.csv``, and ``test_unlabeled.csv``.

Alex et al. 2021, "RAFT: A Real-World Few-Shot Text Classification Benchmark" (arXiv 2109.14076). A folder is read
like the hub's data set: the label column's integers are places in ``Unlabeled`` and the classes, as there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from foreword.config import DataConfig
from foreword.data.labels import UNLABELLED, is_missing
from foreword.data.template import escaped, require_columns
from foreword.errors import ForewordError
from foreword.records import Row, Table

TASK = "task.json"
FILES = {"train": "train.csv", "test": "test_unlabeled.csv"}
ID = "ID"
HIDDEN = "Unlabeled"
"""The name that the hub's RAFT gives the label 0."""
NOTHING = "-"
"""Stands for an empty cell: RAFT has abstracts and journals that are not known, and wants an answer to every row."""


@dataclass(frozen=True)
class RaftTask:
    """What ``task.json`` says: input columns without the ID, the label's column and its classes."""

    folder: Path
    name: str
    columns: tuple[str, ...]
    label: str
    classes: tuple[str, ...]

    @property
    def template(self) -> str:
        """Every input column with its name before it. None is marked as cut, so the longest gives way first."""
        between = " " if len(self.columns) == 1 else "\n"
        return between.join([*(f"{escaped(c)} : {{{c}}}" for c in self.columns), f"{escaped(self.label)} :"])

    def file(self, split: str) -> Path:
        """Where a split's rows lie."""
        if split not in FILES:
            raise ForewordError(f"a RAFT task has no split '{split}'", str(self.folder), f"one of {', '.join(FILES)}")
        if not (self.folder / FILES[split]).is_file():
            what = f"there is no {FILES[split]} in the RAFT task folder"
            raise ForewordError(what, str(self.folder), "put it there, as RAFT has it")
        return self.folder / FILES[split]

    def table(self, columns: Sequence[str], rows: Sequence[Row], split: str) -> Table:
        """The rows of a split's file, nothing empty; the test's get RAFT's label for rows without one.

        Raises:
            ForewordError: no such column, or a test row without an ID of its own.
        """
        where = str(self.file(split))
        given = [self.label] if split == "train" else [ID]
        require_columns([*self.columns, *given], columns, where)
        if split == "test":
            _check_ids([str(row[ID]) for row in rows], where)
            columns = [*(c for c in columns if c != self.label), self.label]
            rows = [{**row, self.label: HIDDEN} for row in rows]
        full = [{**row, **{c: NOTHING for c in self.columns if is_missing(row[c])}} for row in rows]
        names = {self.label: (HIDDEN, *self.classes)}
        return Table(tuple(full), tuple(columns), where, tuple(range(1, len(full) + 1)), names)

    def spelling(self, classes: Sequence[str], run: str) -> Mapping[str, str]:
        """RAFT's name of each of a run's classes.

        They may differ in case, spaces and underscores, or be RAFT's integers, which count from 1.

        Raises:
            ForewordError: the run has other classes.
        """
        own: list[tuple[Callable[[str], str], Mapping[str, str]]] = [
            (fold, {fold(n): n for n in self.classes}) for fold in (str, _plain)
        ]
        own.append((str.strip, {str(i): n for i, n in enumerate(self.classes, start=1)}))
        for fold, names in own:
            if len(classes) == len(names) and {fold(c) for c in classes} == set(names):
                return {c: names[fold(c)] for c in classes}
        lacking = [n for n in self.classes if _plain(n) not in {_plain(c) for c in classes}]
        what = f"no class '{lacking[0]}'" if lacking else "other classes"
        raise ForewordError(
            f"the run has {what}: it knows {len(classes)} classes, the task {self.name} has {len(self.classes)}",
            f"{run}, {self.folder / TASK}",
            f"train on the folder itself, which brings all classes: --data {self.folder}",
        )

    def check_answers(self, answers: Sequence[Row], asked: Sequence[Row], where: str) -> None:
        """Refuses answers in which an ID of the test is missing, stands twice or elsewhere, or has no class of RAFT."""
        for number, (answer, row) in enumerate(zip(answers, asked, strict=False), start=1):
            if answer.get(ID) != str(row[ID]) or answer.get(self.label) not in self.classes:
                what = f"row {number} should have the ID {row[ID]} and one of the task's classes"
                raise ForewordError(what, where, "delete the file and predict again")
        if len(answers) != len(asked):
            raise ForewordError(f"{len(answers)} answers to {len(asked)} rows", where, "delete it and predict again")


def is_task(folder: Path) -> bool:
    """Whether the folder is a RAFT task's."""
    return (folder / TASK).is_file()


def read_task(folder: Path) -> RaftTask:
    """Reads ``task.json``.

    Raises:
        ForewordError: it is not there, damaged, or without columns and classes.
    """
    file = folder / TASK
    if not file.is_file():
        raise ForewordError(f"there is no {TASK} in the folder", str(folder), f"name a RAFT task folder: {_shape()}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        ((label, names),) = content["label_columns"].items()
        columns = tuple(str(c) for c in content["data_columns"] if c != ID)
        classes = tuple(str(n) for n in names if str(n).lower() not in UNLABELLED)
        if not columns or len(set(classes)) < max(2, len(classes)):
            raise ValueError("no columns, or not two different classes")
        return RaftTask(folder, str(content.get("name", folder.resolve().name)), columns, str(label), classes)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise ForewordError(
            f"damaged task file ({type(e).__name__}: {e})", str(file),
            'write {"name": ..., "data_columns": ["text", "ID"], "label_columns": {"Label": ["class", ...]}}',
        ) from None  # fmt: skip


def filled_in(data: DataConfig) -> DataConfig:
    """The data section with the label and the template that a RAFT task folder in ``path`` brings, unless given."""
    folder = Path(data.path).expanduser()
    if not data.path or not is_task(folder):
        return data
    task = read_task(folder)
    template = task.template if data.template is None and not data.text else data.template
    return replace(data, label=data.label or task.label, template=template)


def _check_ids(ids: Sequence[str], where: str) -> None:
    seen: dict[str, int] = {}
    for number, own in enumerate(ids, start=1):
        if not own.strip() or own in seen:
            what = f"row {number} has no ID" if not own.strip() else f"rows {seen[own]} and {number} have the ID {own}"
            raise ForewordError(what, where, "give every row an ID of its own, as RAFT has them")
        seen[own] = number


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _shape() -> str:
    return ", ".join([TASK, *FILES.values()])
