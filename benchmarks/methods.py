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

import results
import torch

import foreword

VARIANTS: dict[str, dict[str, Any]] = {
    "prompt-tuning": {},
    "p-tuning (mlp)": {"method": "p-tuning"},
    "p-tuning (lstm)": {"method": "p-tuning", "encoder": "lstm"},
    "residual": {"method": "residual"},
    "low-rank": {"method": "low-rank"},
    "prefix-tuning": {"method": "prefix-tuning"},
    "prefix-tuning (projection)": {"method": "prefix-tuning", "projection": True},
    "prefix-tuning (random start)": {"method": "prefix-tuning", "init": "random"},
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
            model=model, data=str(source.train), eval_data=str(source.test), template=source.template, label=label,
            out=out, prompt=prompt, train={"epochs": source.epochs, "seed": seed},
        )  # fmt: skip
        sidecar = json.loads((out / "foreword.json").read_text())
        size = (out / WEIGHTS).stat().st_size
    training = sidecar["training"]
    return {
        "data": source.name, "variant": variant, "seed": seed, "accuracy": task.scores["accuracy"],
        "macro_f1": task.scores["macro_f1"], "test_rows": task.scores["n"], "steps": training["steps"],
        "lr": training["lr"], "step_s": training["seconds"] / training["steps"], "file_bytes": size,
        "trainable": training["trainable"], "virtual_tokens": task.prompt.tokens,
        "read_each_time": task.prompt.virtual_ids, "peft_type": task.adapter.config["peft_type"],
        "zero_shot": task.scores["baselines"]["zero_shot"]["accuracy"], "rows": training["rows"],
    }  # fmt: skip


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
                print(
                    f"{source.name:6} {variant:28} seed {seed}: accuracy {run['accuracy']:.3f}, {run['step_s']:.2f} s"
                )
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
