"""A backbone of 7B random weights trained in this machine's memory, and how much that takes; docs/scale.md shows it.

.venv/bin/python benchmarks/large.py [--folder DISK]     # 14 GB of disk for the weights

The checkpoint is written layer by layer, so that making it takes no memory either. Each way to load it is one
``foreword train`` in a process of its own, whose memory is looked at while it runs: in all (resident), and without the
pages of files that are mapped, which the system takes back when it needs them (own).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import results
import torch
from shapes import TINY

from foreword.backbone.load import load_tokenizer
from foreword.config import ModelConfig
from foreword.training.progress import METRICS

SHAPE = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 49152, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Llama-2-7B's, with the small model's vocabulary."""
WAYS = {"bfloat16": "none", "nf4": "nf4"}
"""By name the value of ``model.quantize``."""
ROWS, LENGTH, STEPS, TOKENS = 8, 20, 3, 16
WORDS = ["stone", "river", "lamp", "green", "paper", "window"]
EVERY = 0.1
"""Seconds between two looks at a process's memory."""
GB = 1e9


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures all ways and writes the results file."""
    args = _arguments(argv)
    sizes = {**SHAPE, **(TINY if args.tiny else {}), "vocab_size": SHAPE["vocab_size"]}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        stored = write_model(folder / "model", sizes)
        write_rows(folder / "rows.csv")
        found = []
        for way in args.ways:
            found.append({"way": way, **run(folder, WAYS[way], folder / way)})
            print(json.dumps(found[-1]), flush=True)
    step = {"virtual_tokens": TOKENS, "rows": ROWS, "steps": STEPS}
    facts = results.facts(torch.device("cpu")) | {"kind": "large", "shape": sizes, "stored_gb": stored / GB}
    return results.write(
        facts | {"memory_gb": psutil.virtual_memory().total / GB, "step": step, "ways": found}, args.out
    )


def write_model(folder: Path, sizes: Mapping[str, Any]) -> int:
    """A checkpoint of random bfloat16 weights, one file a layer; returns its bytes."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
    folder.mkdir()
    generator, places, total = torch.Generator().manual_seed(0), {}, 0
    for number, names in enumerate(in_files(shapes)):
        file = f"model-{number:05d}.safetensors"
        weights = {name: _random(name, shapes[name], generator) for name in names}
        save_file(weights, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    load_tokenizer(ModelConfig("smollm2-135m"))[0].save_pretrained(folder)
    return total


def in_files(shapes: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of weights, layer by layer; those of no layer first."""
    groups: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else ""
        groups.setdefault(layer, []).append(name)
    yield from groups.values()


def write_rows(path: Path) -> None:
    """Two classes of random words."""
    rng = random.Random(0)
    with path.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "label"])
        for i in range(ROWS):
            writer.writerow([" ".join(rng.choices(WORDS, k=LENGTH)), "ab"[i % 2]])


def run(folder: Path, quantize: str, out: Path) -> dict[str, Any]:
    """One training: its peaks of memory, seconds and losses."""
    command = [
        sys.executable, "-m", "foreword", "train", "--model", str(folder / "model"), "--data", str(folder / "rows.csv"),
        "--text", "text", "--label", "label", "--out", str(out), f"model.quantize={quantize}", "model.dtype=bfloat16",
        f"prompt.virtual_tokens={TOKENS}", f"train.epochs={STEPS}", f"train.batch_size={ROWS}",
    ]  # fmt: skip
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        peaks = watched(process)
        said = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"training failed:\n{said[-3000:]}")
    events = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    return {
        **{f"{k}_gb": v / GB for k, v in peaks.items()}, "seconds": time.monotonic() - start,
        "step_seconds": statistics.median(e["seconds"] for e in steps), "losses": [e["loss"] for e in steps],
    }  # fmt: skip


def watched(process: subprocess.Popen[str]) -> dict[str, int]:
    """The largest memory of a process until it ends, in bytes: in all, and its own."""
    peaks = {"resident": 0, "own": 0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        status = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        for name, key in (("resident", "VmHWM"), ("own", "RssAnon")):
            peaks[name] = max(peaks[name], int(status.get(key, ["0"])[0]) * 1024)
        time.sleep(EVERY)
    return peaks


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the architecture alone, to try the benchmark")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["bfloat16"])
    parser.add_argument("--folder", type=Path, help="where the weights lie meanwhile")
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    return parser.parse_args(argv)


if __name__ == "__main__":
    print(main())
