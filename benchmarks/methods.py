"""Every method on the same rows under one budget of steps: docs/methods.md is made from what this writes.

.venv/bin/python benchmarks/methods.py --data FOLDER

Data sets and draws are those of benchmarks/quality.py; a seed is another draw. Rows stay where they are; only scores
go into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
import torch
from quality import scores
from quality_contenders import predicted
from quality_data import DATA, Split, splits

import foreword

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
EPOCHS = {"trec": 8, "sst2": 12}
"""Of each data set's draws: about a hundred steps and fifty."""
WEIGHTS = "adapter_model.safetensors"


def measure(data: str, split: Split, variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training, scored on the test rows."""
    prompt = {"virtual_tokens": args.virtual_tokens, **VARIANTS[variant]}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        task = foreword.train(
            model={"id": args.model, "dtype": args.dtype}, data=split.train, template=DATA[data].template,
            label="label", out=out, prompt=prompt, train={"epochs": args.epochs or EPOCHS[data], "seed": seed},
            quiet=True,
        )  # fmt: skip
        training = json.loads((out / "foreword.json").read_text())["training"]
        size = (out / WEIGHTS).stat().st_size
        labels = predicted(task, split.test)
    return {
        "data": data, "variant": variant, "seed": seed, **scores(split.test, labels), "test_rows": len(split.test),
        "steps": training["steps"], "lr": training["lr"], "file_bytes": size, "trainable": training["trainable"],
        "virtual_tokens": task.prompt.tokens, "read_each_time": task.prompt.virtual_ids,
        "peft_type": task.adapter.config["peft_type"], "rows": training["rows"],
    }  # fmt: skip


def main() -> None:
    """Runs what is asked for, writing after every training."""
    args = _arguments()
    found = results.facts(torch.device("cpu")) | {
        "kind": "methods", "model": results.data_name(args.model), "dtype": args.dtype, "runs": []
    }  # fmt: skip
    path = results.FOLDER / f"{found['date']}-methods{args.suffix}.json"
    if args.resume and path.is_file():
        found["runs"] = json.loads(path.read_text())["runs"]
    done = {(r["data"], r["variant"], r["seed"]) for r in found["runs"]}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for data in args.datasets:
            (split,) = splits(DATA[data], args.data, DATA[data].sizes[0], seed, args.test_rows)
            for variant in args.only or VARIANTS:
                if (data, variant, seed) in done:
                    continue
                run = measure(data, split, variant, seed, args)
                print(f"{data:6} {variant:28} seed {seed}: accuracy {run['accuracy']:.3f}", flush=True)
                found["runs"].append(run)
                path.write_text(json.dumps(found, indent=2) + "\n")


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--datasets", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--test-rows", type=int, default=200, help="a fixed random subset of so many")
    parser.add_argument("--epochs", type=int, default=0, help="instead of the data set's own")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32", help="of the backbone's weights, as model.dtype")
    parser.add_argument("--virtual-tokens", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=VARIANTS)
    parser.add_argument("--suffix", default="")
    parser.add_argument("--resume", action="store_true", help="go on with today's result")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
