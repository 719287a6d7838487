"""One process of benchmarks/scale.py: steps of one layout, their time, and every collective they call.

Started by torchrun with a JSON file of settings; the first process writes what all measured.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from foreword.backbone.load import load_backbone
from foreword.config import Member, ModelConfig, PromptConfig, TrainConfig
from foreword.parallel.world import World, joined
from foreword.prompts.methods.base import Start
from foreword.prompts.methods.prompt_tuning import PromptTuning
from foreword.records import Segment
from foreword.training.engine import Eager
from foreword.training.passes import Reader
from foreword.training.state import Population, make_plan, start

COLLECTIVES = ("all_gather", "allgather", "all_reduce", "allreduce", "reduce_scatter", "broadcast", "all_to_all")
WARM_UP = 2
GATHERED, SUMMED, LINK_CALLS = 14 << 20, 680 << 10, 15
"""Bytes that the connection is measured with, about a layer's weights and its activations, and how often."""


class Counting(TorchDispatchMode):
    """Inside, every collective is noted: its kind and the bytes of the whole tensor it makes or sums."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        kind = next((c for c in COLLECTIVES if c in name), "") if "c10d" in name and "wait" not in name else ""
        out = func(*args, **(kwargs or {}))
        if kind:
            sized = [t for t in _tensors((args, out)) if t.numel()]
            self.calls.append((kind.replace("allg", "all_g").replace("allr", "all_r"), max(map(_bytes, sized))))
        return out


def _tensors(found: Any) -> list[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for x in found for t in _tensors(x)] if isinstance(found, (list, tuple)) else []


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def rows(count: int, tokens: int, targets: int, first: int, virtual: int) -> list[Segment]:
    """Rows of random ids behind the virtual ones, all of one length."""
    random = torch.Generator().manual_seed(0)
    opening = tuple(range(first, first + virtual))

    def ids(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, first, (size,), generator=random).tolist())

    return [Segment(opening + ids(tokens - targets), (ids(targets),)) for _ in range(count)]


def measure(settings: dict[str, Any], world: World) -> dict[str, Any]:
    """Seconds of each step, and the collectives of one more."""
    backbone = load_backbone(ModelConfig(settings["model"]), world)
    virtual, batch = settings["virtual_tokens"], settings["batch_size"]
    segments = rows(batch, settings["tokens"], settings["targets"], backbone.vocab_size, virtual)
    config = TrainConfig(batch_size=batch, epochs=settings["steps"] + WARM_UP + 1, lr=0.03)
    random = torch.Generator().manual_seed(0)
    first = PromptTuning(Start(torch.randn(virtual, backbone.hidden_size, generator=random)), PromptConfig(), random)
    plan = make_plan(batch, config)
    population = start([first], [Member("random", 0, 0.03)], config, plan, backbone.device)
    opening = segments[0].context[:virtual]
    own = [Segment(s.context[virtual:], s.branches) for s in segments]
    reader = Reader(opening, backbone.vocab_size, virtual, batch, 1 << 20, "packed")
    engine = Eager(backbone, reader, config)
    engine.load(population.states, [[own]] * plan.steps)
    seconds = [_timed(engine) for _ in range(WARM_UP + settings["steps"])][WARM_UP:]
    with Counting() as counted:
        engine.step()
    return {
        "layout": str(world.layout), "processes": world.layout.processes, "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)], "norm": _norm(population), "calls": counted.calls,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "link": link() if world.several else None,
    }  # fmt: skip


def link() -> dict[str, float]:
    """What the processes' connection does: bytes a second that each sends, and seconds of the smallest collective."""
    n = dist.get_world_size()
    whole, part, one = torch.zeros(GATHERED // 4), torch.zeros(GATHERED // 4 // n), torch.zeros(1)
    summed = torch.zeros(SUMMED // 4)
    return {
        "gather": GATHERED * (n - 1) / n / _median(lambda: dist.all_gather_into_tensor(whole, part)),
        "sum": 2 * SUMMED * (n - 1) / n / _median(lambda: dist.all_reduce(summed)),
        "latency": _median(lambda: dist.all_reduce(one)),
    }


def _median(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(LINK_CALLS):
        dist.barrier()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _timed(engine: Eager) -> float:
    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    float(engine.step().loss.sum())
    return time.perf_counter() - began


def _norm(population: Population) -> float:
    """Of the soft prompt after all steps: every layout ends at the same."""
    return float(population.states[0].method().detach().norm())


def main(argv: Sequence[str]) -> None:
    """Runs the settings' layout and writes what the first process found."""
    settings = json.loads(Path(argv[0]).read_text())
    if cores := settings["cores"]:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        os.sched_setaffinity(0, cores[rank % len(cores)])
    torch.set_num_threads(settings["threads"])
    with joined(settings["layout"], torch.device("cpu"), 10) as world:
        found = measure(settings, world)
        if world.first:
            Path(argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
