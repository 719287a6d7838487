"""Every method on the same rows under one budget of steps: docs/methods.md is made from what this writes.

.venv/bin/python benchmarks/methods.py --data NAME=TRAIN.csv,TEST.csv --template "Question : {text} Type :" ...

A data set is a name, training rows and test rows, with its own --template and --epochs in the same
order. Rows stay where they are; only scores go into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch

import foreword
from foreword.data.sources import read_table
from foreword.evaluation.metrics import accuracy, confusion_matrix, macro_f1

VARIANTS: dict[str, dict[str, Any]] = {
    "prompt-tuning": {},
    "prefix-tuning": {"method": "prefix-tuning"},
    "p-tuning (mlp)": {"method": "p-tuning"},
    "p-tuning (lstm)": {"method": "p-tuning", "encoder": "lstm"},
    "residual": {"method": "residual"},
    "low-rank": {"method": "low-rank"},
    "prefix-tuning (projection)": {"method": "prefix-tuning", "projection": True},
    "prefix-tuning (random start)": {"method": "prefix-tuning", "init": "random"},
    "context-tuning": {"method": "context-tuning"},
    "multitask": {"method": "multitask"},
    "cpt": {"method": "cpt", "virtual_tokens": 128},
    "cartridge": {"method": "cartridge"},
}
"""Settings of ``prompt`` by their name in the table."""
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """A data set: names, files, template and training budget."""

    name: str
    train: Path
    test: Path
    template: str
    epochs: int


def measure(source: Source, variant: str, seed: int, model: str, label: str, tokens: int) -> dict[str, Any]:
    """One training, scored on the test rows."""
    prompt = {"virtual_tokens": tokens, **VARIANTS[variant]}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        task = foreword.train(
            model=model, data=str(source.train), template=source.template, label=label, out=out, prompt=prompt,
            train={"epochs": source.epochs, "seed": seed},
        )  # fmt: skip
        training = json.loads((out / "foreword.json").read_text())["training"]
        size = (out / WEIGHTS).stat().st_size
    truth, confusion = confused(task, source.test, label)
    return {
        "data": source.name, "variant": variant, "seed": seed, "accuracy": accuracy(confusion),
        "macro_f1": macro_f1(confusion), "test_rows": len(truth), "steps": training["steps"], "lr": training["lr"],
        "file_bytes": size, "trainable": training["trainable"], "virtual_tokens": task.prompt.tokens,
        "read_each_time": task.prompt.virtual_ids, "peft_type": task.adapter.config["peft_type"],
        "rows": training["rows"],
    }  # fmt: skip


def confused(task: Any, test: Path, label: str) -> tuple[list[int], Any]:
    """True classes of the test rows, and the confusion matrix ``[C, C]`` of the predictions."""
    table = read_table(str(test), "test")
    classes = task.task.classes
    truth = [classes.index(str(row[label])) for row in table.rows]
    said = [classes.index(p.label) for p in task.predict(table.rows)]
    return truth, confusion_matrix(np.array(truth), np.array(said), len(classes))


def main() -> None:
    """Runs what is asked for, writing after every training."""
    args = _arguments()
    given = zip(args.data, args.template, args.epochs, strict=True)
    sources = [_source(data, template, epochs) for data, template, epochs in given]
    found = results.facts(torch.device("cpu")) | {"kind": "methods", "model": args.model, "runs": []}
    path = results.FOLDER / f"{found['date']}-methods{args.suffix}.json"
    if args.resume and path.is_file():
        found["runs"] = json.loads(path.read_text())["runs"]
    done = {(r["data"], r["variant"], r["seed"]) for r in found["runs"]}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for source in sources:
            for variant in args.only or VARIANTS:
                if (source.name, variant, seed) in done:
                    continue
                run = measure(source, variant, seed, args.model, args.label, args.virtual_tokens)
                line = f"{source.name:6} {variant:28} seed {seed}: accuracy {run['accuracy']:.3f}"
                print(line, flush=True)
                found["runs"].append(run)
                path.write_text(json.dumps(found, indent=2) + "\n")


def _source(data: str, template: str, epochs: int) -> Source:
    name, _, files = data.partition("=")
    train, _, test = files.partition(",")
    return Source(name, Path(train), Path(test), template, epochs)


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=TRAIN,TEST")
    parser.add_argument("--template", action="append", required=True)
    parser.add_argument("--epochs", action="append", type=int, required=True)
    parser.add_argument("--label", default="label")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--virtual-tokens", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=VARIANTS)
    parser.add_argument("--suffix", default="")
    parser.add_argument("--resume", action="store_true", help="go on with today's result")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
