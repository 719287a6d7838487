"""Several processes against one, on this machine: speed, memory, and all that is sent; docs/scale.md shows it.

.venv/bin/python benchmarks/scale.py [--rounds 3]

The backbone has SmolLM2-135M's shape but for its 9 heads, of which no two processes can have as many: 8 of 72, random
weights. Every process has a core of its own, the single one too; more processes than cores share them. Layouts take
turns, round by round. Which collectives a step calls, and of what size, is counted in a step of its own.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from shapes import SHAPES, TINY

from foreword.backbone.load import load_tokenizer
from foreword.config import ModelConfig

LAYOUTS = ("ddp=1", "ddp=2", "fsdp=2", "tp=2", "ddp=4", "fsdp=2,tp=2")
WORKER = Path(__file__).with_name("scale_worker.py")
STEP = {"virtual_tokens": 16, "batch_size": 8, "tokens": 36, "targets": 3}


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures all layouts and writes the results file."""
    args = _arguments(argv)
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, list[dict[str, Any]]] = {layout: [] for layout in args.layouts}
    with tempfile.TemporaryDirectory() as folder:
        model = str(made(Path(folder) / "model", args.tiny))
        for _ in range(args.rounds):
            for layout in args.layouts:
                found[layout].append(run(layout, model, args.steps, cores))
                print(layout, f"{found[layout][-1]['seconds']:.3f} s a step", flush=True)
    facts = results.facts(torch.device("cpu"))
    step = {**STEP, "steps": args.steps, "rounds": args.rounds}
    measured = [_summed(found[name]) for name in args.layouts]
    return results.write(
        facts | {"kind": "scale", "shape": shape(args.tiny), "cores": len(cores), "step": step, "layouts": measured},
        args.out,
    )


def shape(tiny: bool) -> dict[str, Any]:
    """Sizes of the backbone."""
    given = {**SHAPES["SmolLM2-135M"], "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 72}
    return {**given, **TINY} if tiny else given


def made(folder: Path, tiny: bool) -> Path:
    """A model folder of random weights, with the small model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape(tiny)), dtype=torch.float32)
    model.save_pretrained(folder)
    load_tokenizer(ModelConfig("smollm2-135m"))[0].save_pretrained(folder)
    return folder


def run(layout: str, model: str, steps: int, cores: Sequence[int]) -> dict[str, Any]:
    """One launch: what scale_worker.py found."""
    count = processes(layout)
    own = [[core] for core in cores]
    settings = {**STEP, "layout": layout, "model": model, "steps": steps, "threads": 1, "cores": own}
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "settings.json", Path(folder) / "found.json"
        given.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port",
                   str(_free_port()), str(WORKER), str(given), str(out)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"{layout} failed:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def processes(layout: str) -> int:
    """How many a layout is for."""
    return math.prod(int(size) for size in re.findall(r"=(\d+)", layout))


def counted(calls: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Collectives of a step by kind and size."""
    found = collections.Counter((kind, size) for kind, size in calls)
    return [{"kind": kind, "size": size, "calls": n} for (kind, size), n in sorted(found.items())]


def _summed(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [r["seconds"] for r in rounds]
    first = rounds[0]
    return {
        "layout": first["layout"], "processes": first["processes"], "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)], "peak_mb": max(r["peak_mb"] for r in rounds), "norm": first["norm"],
        "link": first["link"], "collectives": counted(first["calls"]),
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the architecture alone, to try the benchmark")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
