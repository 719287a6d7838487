"""The honest table's measurements: accuracy and macro-F1 of every contender over seeds; docs/results.md shows them.

.venv/bin/python benchmarks/quality.py --data FOLDER --contenders majority tfidf --seeds 0 1 2 3 4

FOLDER holds a folder a data set with train.csv and test.csv (benchmarks/quality_data.py lists them); rows stay
there. Every result goes as a line into a cache as soon as it is known, and all go into
benchmarks/results/DATE-quality.json in the end, so a run can be stopped at any time and started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results
from quality_contenders import ANSWERS, CONTENDERS, DRAWLESS, Answer, Bench, Job
from quality_data import DATA, Labelled, Split, by_class, splits

from foreword.backbone.load import choose_device, choose_dtype
from foreword.config import TuneConfig
from foreword.evaluation.metrics import accuracy, confusion_matrix, macro_f1

CACHE = Path(__file__).parent.parent / "runs" / "quality.jsonl"
KEY = ("data", "size", "seed", "contender", "model", "test_rows")
"""What a result is known by: measured again, it takes the older one's place."""
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    data: str
    size: str
    seed: int
    contender: str


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures what is asked for and not yet known; returns the results file."""
    args = _arguments(argv)
    mend(args.cache)
    bench = Bench(args.model, args.few_shot_tokens, args.tune_minutes, args.tune_trainings, args.tune_members,
                  dtype=args.dtype)  # fmt: skip
    measure_all(bench, args)
    return write(args)


def measure_all(bench: Bench, args: argparse.Namespace) -> None:
    """Appends to the cache cell by cell, until all are known or the time is up."""
    known = set() if args.again else {key(run) for run in (*published(args.out), *read(args.cache))}
    model, ends = results.data_name(args.model), time.monotonic() + 60 * (args.budget_minutes or math.inf)
    for cell in cells(args):
        parts = splits(DATA[cell.data], args.data, cell.size, cell.seed, args.test_rows)
        scored = sum(len(part.test) for part in parts)
        wanted = [(cell.data, cell.size, cell.seed, a, model, scored) for a in ANSWERS[cell.contender]]
        if all(w in known for w in wanted):
            continue
        if time.monotonic() > ends:
            print("time is up: the same command goes on", flush=True)
            return
        for run in measure(bench, cell, parts):
            append(args.cache, run)
            print(f"{cell.data} {cell.size} seed {cell.seed} {run['contender']}: {run['accuracy']:.3f}", flush=True)


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """What is asked for: all of one seed first, so that a stopped run has whole blocks."""
    for turn, seed in enumerate(args.seeds):
        for data in args.datasets:
            for size in DATA[data].sizes:
                if size not in (args.sizes or [size]):
                    continue
                for name in args.contenders:
                    if name not in DRAWLESS:
                        yield Cell(data, size, seed, name)
                    elif not turn:
                        yield Cell(data, size, 0, name)


def measure(bench: Bench, cell: Cell, parts: Sequence[Split]) -> list[dict[str, Any]]:
    """Trains and scores one cell: summary numbers only, of each of the contender's answers.

    Cross-validated rows are pooled over the folds before they are scored.
    """
    began = time.monotonic()
    answers = []
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(bench, DATA[cell.data], part, cell.seed, Path(folder))
            answers.append(CONTENDERS[cell.contender](job))
    truth = [row for part in parts for row in part.test]
    shared = dataclasses.asdict(cell) | {
        "model": results.data_name(bench.model), "train_rows": len(parts[0].train), "test_rows": len(truth),
        "seconds": round(time.monotonic() - began, 1), **where(bench.dtype),
    }  # fmt: skip
    return [
        shared | {"contender": name} | scores(truth, [label for a in answers for label in a[name].labels])
        | pooled([a[name] for a in answers])
        for name in ANSWERS[cell.contender]
    ]  # fmt: skip


def where(dtype: str) -> dict[str, Any]:
    """Day, machine and type of the weights of a result: cells may come from several."""
    device = choose_device("auto")
    facts, computed = results.facts(device), str(choose_dtype(dtype, device)).removeprefix("torch.")
    return {
        "dtype": computed,
        "date": facts["date"],
        "machine": facts["machine"],
        "foreword": facts["versions"]["foreword"],
    }


def scores(rows: Sequence[Labelled], said: Sequence[str]) -> dict[str, float]:
    """Accuracy and macro-F1."""
    classes = [*by_class(rows), *sorted(set(said) - {r["label"] for r in rows})]
    truth, guess = ([classes.index(x) for x in xs] for xs in ([r["label"] for r in rows], said))
    confusion = confusion_matrix(np.array(truth), np.array(guess), len(classes))
    return {"accuracy": round(accuracy(confusion), 4), "macro_f1": round(macro_f1(confusion), 4)}


def pooled(answers: Sequence[Answer]) -> dict[str, Any]:
    """The facts that the answers of all splits share."""
    first, *rest = (answer.facts for answer in answers)
    return {name: value for name, value in first.items() if all(facts[name] == value for facts in rest)}


def key(run: Run) -> tuple[Any, ...]:
    """What tells one result from another."""
    return tuple(run[name] for name in KEY)


def append(cache: Path, run: Run) -> None:
    """Adds a result, on the disk before the next is begun."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a") as file:
        file.write(json.dumps(run) + "\n")


def read(cache: Path) -> list[dict[str, Any]]:
    """The cache's results."""
    return [json.loads(line) for line in cache.read_text().splitlines()] if cache.is_file() else []


def mend(cache: Path) -> None:
    """Takes away the half line that a killed run may have left."""
    if cache.is_file():
        lines = cache.read_text().splitlines(keepends=True)
        cache.write_text("".join(line for line in lines if line.endswith("\n")))


def published(folder: Path) -> list[dict[str, Any]]:
    """The results of the newest file."""
    found = results.newest(folder, "quality")
    return list(found[0]["runs"]) if found else []


def write(args: argparse.Namespace) -> Path:
    """All that is known as a dated file, which replaces the one it goes on from on the same day only."""
    runs = {key(run): run for run in (*published(args.out), *read(args.cache))}
    order = {name: i for i, name in enumerate(a for names in ANSWERS.values() for a in names)}
    ranked = sorted(
        runs.values(), key=lambda r: (list(DATA).index(r["data"]), r["size"], order[r["contender"]], r["seed"])
    )
    facts = results.facts(choose_device("auto"))
    return results.write(facts | {"kind": "quality", "data": described(), "runs": ranked}, args.out)


def described() -> dict[str, Any]:
    """What each data set is and how its rows are written, for the page."""
    return {
        name: {"rows": d.note, "template": d.template, "guide_text": d.instruction, "label_words": dict(d.words)}
        for name, d in DATA.items()
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--datasets", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--sizes", nargs="+", help="of these only, such as 32 or all")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=[n for n in CONTENDERS if n != "guide-peft"]
    )
    parser.add_argument("--peft", action="store_true", help="run the guide's recipe in PEFT itself, not in our loop")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--test-rows", type=int, default=0, help="a fixed random subset of so many; 0: all")
    parser.add_argument("--budget-minutes", type=float, default=0, help="begin nothing after so many; 0: no limit")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto", help="of the backbone's weights, as model.dtype")
    parser.add_argument("--few-shot-tokens", type=int, default=1024)
    parser.add_argument("--tune-minutes", type=float, default=TuneConfig().minutes)
    parser.add_argument("--tune-trainings", type=float, default=0, help="its budget, instead of minutes")
    parser.add_argument("--tune-members", type=int, default=TuneConfig().members)
    parser.add_argument("--again", action="store_true", help="measure again what is known")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    args = parser.parse_args(argv)
    if args.peft:
        args.contenders = list(dict.fromkeys("guide-peft" if c == "guide" else c for c in args.contenders))
    return args


if __name__ == "__main__":
    main()
