"""The data sets of the honest table: what a row looks like, and which rows are trained and scored on."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Labelled = Mapping[str, str]
"""A row: ``text`` and ``label``, whose value is the class's label words."""
ALL = "all"
FOLDS = 5
CROSS_VALIDATED = f"{FOLDS}-fold cross-validation"
TEST_SEED = 2026
"""Of the fixed random subset of test rows; has nothing to do with the seeds that are compared."""


@dataclass(frozen=True)
class DataSet:
    """One data set for every contender alike."""

    folder: str
    """Below the data folder: train.csv and, unless it is cross-validated, test.csv."""
    template: str
    instruction: str
    """The text the guide's recipe starts from, in the manner of the guide."""
    sizes: tuple[str, ...]
    """Numbers of training rows; ``ALL``; ``CROSS_VALIDATED``."""
    note: str
    """Which rows these are, in words."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Label words where the file's own label is not one."""
    columns: tuple[str, str] = ("text", "label")


DATA: dict[str, DataSet] = {
    "sst2": DataSet(
        "sst2", "Review : {text} Sentiment :", "Classify if the review is positive or negative:", ("32", ALL),
        "the published split, whole sentences",
    ),
    "trec": DataSet(
        "trec", "Question : {text} Type :", "Classify the type of the question:", ("96", ALL),
        "the published split, coarse types by their full names",
    ),
    "subj": DataSet(
        "subj", "Sentence : {text} Kind :", "Classify if the sentence is subjective or objective:", ("32",),
        "no published split: one row in five is test, by a hash of its text",
    ),
    "ag_news": DataSet(
        "ag_news", "News : {text} Topic :", "Classify the topic of the news:", ("64",),
        "the published test; draws from 5,614 of the training rows",
        {"Business": "business", "Sci/Tech": "technology", "Sports": "sports", "World": "world"},
    ),
    "clinc150_domain": DataSet(
        "clinc150_domain", "Request : {text} Domain :", "Classify the domain of the request:", ("160",),
        "the published split, the ten domains as classes",
    ),
    "raft_complaints": DataSet(
        "raft/twitter_complaints", "Tweet text : {text} Label :", "Classify if the tweet is a complaint or not:",
        (CROSS_VALIDATED,), "RAFT's 50 labelled rows; the labels of its test are hidden",
        columns=("Tweet text", "Label"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Rows to train on, and others to score on."""

    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    commonest: str
    """Label of most rows that training rows are drawn from: a balanced draw has none itself."""


def splits(data: DataSet, root: Path, size: str, seed: int, test_rows: int = 0) -> list[Split]:
    """What one cell trains and scores on; several splits where it is cross-validated.

    Args:
        data: the data set.
        root: the data folder.
        size: one of its sizes.
        seed: of the draw, or of the folds.
        test_rows: score a fixed random subset of so many; 0: all.
    """
    rows = read(data, root / data.folder / "train.csv")
    if size == CROSS_VALIDATED:
        return folded(rows, seed)
    test = read(data, root / data.folder / "test.csv")
    pool = without(rows, test)
    train = pool if size == ALL else balanced(pool, int(size), seed)
    return [Split(tuple(train), tuple(subset(test, test_rows)), commonest(pool))]


def read(data: DataSet, path: Path) -> list[Labelled]:
    """A file's rows, their labels as label words."""
    text, label = data.columns
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {"text": row[text], "label": data.words.get(row[label], row[label]).replace("_", " ")}
            for row in csv.DictReader(file)
        ]


def without(rows: Sequence[Labelled], test: Sequence[Labelled]) -> list[Labelled]:
    """The first row of every text that is not also a test row's."""
    seen = {normal(row) for row in test}
    kept = []
    for row in rows:
        if normal(row) not in seen:
            seen.add(normal(row))
            kept.append(row)
    return kept


def normal(row: Labelled) -> str:
    """The text in lower case with single spaces."""
    return " ".join(row["text"].lower().split())


def balanced(rows: Sequence[Labelled], size: int, seed: int) -> list[Labelled]:
    """``size`` rows in random order, the same number of each class.

    Raises:
        ValueError: the classes do not divide ``size``, or one has too few rows.
    """
    rng = random.Random(seed)
    groups = by_class(rows)
    each, rest = divmod(size, len(groups))
    if rest or each > min(map(len, groups.values())):
        raise ValueError(f"no {size} rows balanced over {len(groups)} classes")
    drawn = [row for group in groups.values() for row in rng.sample(group, each)]
    rng.shuffle(drawn)
    return drawn


def by_class(rows: Sequence[Labelled]) -> dict[str, list[Labelled]]:
    """The rows of each class, the classes by name."""
    return {name: [r for r in rows if r["label"] == name] for name in sorted({r["label"] for r in rows})}


def commonest(rows: Sequence[Labelled]) -> str:
    """Label of most rows; of equals the first by name."""
    groups = by_class(rows)
    return max(groups, key=lambda name: len(groups[name]))


def subset(rows: Sequence[Labelled], count: int) -> list[Labelled]:
    """A fixed random subset, in the rows' own order; all rows for 0."""
    if not count or count >= len(rows):
        return list(rows)
    chosen = sorted(random.Random(TEST_SEED).sample(range(len(rows)), count))
    return [rows[i] for i in chosen]


def folded(rows: Sequence[Labelled], seed: int) -> list[Split]:
    """Stratified folds: each row is scored once, by what was trained on the other folds."""
    rng = random.Random(seed)
    order = [row for group in by_class(rows).values() for row in rng.sample(group, len(group))]
    held = [order[fold::FOLDS] for fold in range(FOLDS)]
    found = []
    for out in held:
        train = [row for other in held if other is not out for row in other]
        found.append(Split(tuple(train), tuple(out), commonest(train)))
    return found
