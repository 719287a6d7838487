"""From the configuration to tables and a task: everything that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foreword.config import DataConfig
from foreword.data.encode import rows_hash
from foreword.data.labels import build_task, drop_incomplete, label_names
from foreword.data.sources import file_name, read_table, rows_table
from foreword.data.splits import hold_out, k_folds
from foreword.data.template import parse, require_columns
from foreword.errors import ForewordError
from foreword.records import Row, Table, Task

Source = str | Sequence[Row]
"""A path or id, or rows already in memory."""


@dataclass(frozen=True)
class Splits:
    """The tables of a run. ``protocol`` says in words what the score will be measured on."""

    task: Task
    train: Table
    held_out: Table | None
    validation: Table | None
    folds: tuple[tuple[list[int], list[int]], ...]
    protocol: str
    data_hash: str


def read_splits(
    config: DataConfig, rows: Sequence[Row] | None = None, eval_rows: Sequence[Row] | None = None
) -> Splits:
    """Reads all rows and divides them as the configuration says.

    Args:
        config: the data section.
        rows: training rows in memory, instead of ``config.path``.
        eval_rows: held-out rows in memory, instead of ``config.eval_path``.
    """
    table = rows_table(rows) if rows is not None else read_table(config.path, config.split, config.revision)
    if config.drop_incomplete:
        table = drop_incomplete(table, _columns(config, table))
    task = build_task(config, table)
    columns = [f.column for f in parse(task.template).fields]
    digest = rows_hash(table, [*columns, config.label])
    labels = label_names(table, config.label, config.classes) if task.classifies else [""] * len(table)
    held_out, protocol = _held_out(config, eval_rows, task)
    if held_out is not None:
        protocol += _overlap(held_out, table, columns)
    train = table
    if config.eval_fraction:
        keep, out = hold_out(labels, config.eval_fraction, config.seed)
        train, held_out = table.pick(keep), table.pick(out)
        protocol = f"{len(out)} rows held out of {file_name(table.origin)} (seed {config.seed})"
        protocol += _overlap(held_out, train, columns)  # data-to-text sets repeat their inputs
        labels = [labels[i] for i in keep]
    validation = None
    if config.validation_fraction:
        keep, out = hold_out(labels, config.validation_fraction, config.seed)
        train, validation = train.pick(keep), train.pick(out)
        labels = [labels[i] for i in keep]
    folds: tuple[tuple[list[int], list[int]], ...] = ()
    if config.folds:
        if config.folds > len(train):
            raise ForewordError(
                f"{config.folds} folds of {len(train)} rows", train.origin, f"data.folds={min(5, len(train))}"
            )
        folds = tuple(k_folds(labels, config.folds, config.seed))
        protocol = f"{len(folds)}-fold cross-validation on {file_name(train.origin)} (seed {config.seed})"
    return Splits(task, train, held_out, validation, folds, protocol, digest)


def read_labelled(source: Source, split: str, task: Task, incomplete: bool = False) -> Table:
    """Labelled rows for scoring a task: a file, a hub split or rows in memory."""
    table = read_table(source, split) if isinstance(source, str) else rows_table(source)
    return _labelled(table, task, incomplete)


def _labelled(table: Table, task: Task, incomplete: bool) -> Table:
    """The rows that can be scored; refuses missing columns and labels that are hidden or empty."""
    columns = [*(f.column for f in parse(task.template).fields), task.label_column]
    require_columns(columns, table.columns, table.origin)
    if incomplete:
        table = drop_incomplete(table, columns)
    label_names(table, task.label_column, task.names)
    return table


def _held_out(config: DataConfig, eval_rows: Sequence[Row] | None, task: Task) -> tuple[Table | None, str]:
    if eval_rows is not None:
        table = rows_table(eval_rows, "the held-out rows given")
    elif config.eval_path or config.eval_split:
        split = config.eval_split or ("test" if config.eval_path else config.split)
        revision = None if config.eval_path else config.revision
        table = read_table(config.eval_path or config.path, split, revision)
    else:
        return None, ""
    table = _labelled(table, task, config.drop_incomplete)
    return table, f"all {len(table)} rows of {file_name(table.origin)}"


def _overlap(held_out: Table, train: Table, columns: Sequence[str]) -> str:
    """Says how many held-out rows were also trained on: a score on those proves nothing."""
    seen = {tuple(str(r[c]) for c in columns) for r in train.rows}
    twice = sum(tuple(str(r[c]) for c in columns) in seen for r in held_out.rows)
    return f", {twice} of which were also trained on" if twice else ""


def _columns(config: DataConfig, table: Table) -> list[str]:
    named = [f.column for f in parse(config.template).fields] if config.template else [config.text or ""]
    columns = [*named, config.label]
    require_columns(columns, table.columns, table.origin)
    return columns
