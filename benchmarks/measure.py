"""Clocks and meters: alternating timings, their spread, peak memory, and what the machine could do.

Machines are shared and noisy, so contenders take turns batch by batch in one process, and every
figure is a median beside its spread.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from foreword.backbone.memory import Peak

T = TypeVar("T")

MATMUL_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192)}
"""Square matrices tried for the ceiling, growing until one product takes longer than ``SLOW``."""
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
SLOW = 1.0
"""Seconds. A processor without bf16 units would take half a minute for one product of 2048."""
REPEATS = 5


def alternate(
    works: Mapping[str, Callable[[T], Any]], items: Sequence[T], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every work on every item, in turns; an extra first round warms up and is dropped.

    Who begins moves on with every item, so that nobody always follows the same neighbour.

    Returns:
        For each work ``rounds * len(items)`` seconds, round by round in the order of the items.
    """
    names = list(works)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for turn, item in enumerate(items):
            first = (round_ + turn) % len(names)
            for name in names[first:] + names[:first]:
                spent = seconds(lambda: works[name](item), device)  # noqa: B023 (called at once)
                if round_:
                    times[name].append(spent)
    return times


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call, what it started on the device included."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Waits for the device's work in flight."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles in seconds, and the number of runs."""
    q1, _, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    middle = statistics.median(times)
    figures = {"median_s": middle, "min": min(times), "max": max(times), "q1": q1, "q3": q3}
    return {name: digits(value) for name, value in figures.items()} | {"runs": len(times)}


def median_rate(amounts: Sequence[float], times: Sequence[float]) -> float:
    """Median of amounts per second over runs."""
    return digits(statistics.median(a / t for a, t in zip(amounts, times, strict=True)))


def digits(value: float, count: int = 4) -> float:
    """The value to so many significant digits: more would be noise."""
    return float(f"{value:.{count}g}")


def peak_memory(work: Callable[[], Any], device: torch.device, runs: int = 3) -> float | None:
    """Median MB (1e6 bytes) that a call holds at its peak above what was held before it.

    On CUDA what torch's allocator gave out; on Linux resident memory; elsewhere None. Never
    time such a call: on the CPU the allocator's free pages are given back before each.
    """
    sizes = [_peak(work, device) for _ in range(runs)]
    known = [size for size in sizes if size is not None]
    return digits(statistics.median(known) / 1e6) if known else None


def _peak(work: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes, by the meter that Foreword's own runs are measured with."""
    gc.collect()
    meter = Peak(device)
    work()
    synchronize(device)
    return meter.size


def ceilings(device: torch.device) -> dict[str, float]:
    """The most this machine does now: matmul FLOP/s by type, and bytes/s of a copy (read and written).

    ``{"float32": FLOP/s, "bfloat16": FLOP/s, "copy": B/s}``; float32 without TF32, torch's default.
    """
    found = {str(t).removeprefix("torch."): _matmul(t, device) for t in (torch.float32, torch.bfloat16)}
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(REPEATS + 1))
    return found | {"copy": digits(2 * len(source) / best)}


def _matmul(dtype: torch.dtype, device: torch.device) -> float:
    """Best FLOP/s over growing square products and repeats."""
    rate = 0.0
    for size in MATMUL_SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(REPEATS + 1):
            spent = seconds(lambda: torch.mm(a, b, out=out), device)  # noqa: B023 (called at once)
            rate = max(rate, 2 * size**3 / spent)
            if spent > SLOW:
                return digits(rate)
    return digits(rate)


def step_flops(body: int, head: int, fed: int, targets: int) -> float:
    """Useful floating-point operations of one training step of a soft prompt: ``4 (body fed + head targets)``.

    Two for each weight and token forward, two backward with respect to activations; none with
    respect to weights, which are frozen. Attention scores are left out (small at these lengths).

    Args:
        body: weights outside embeddings and the LM head (``weights``).
        head: weights of the LM head, V x H, needed only where a target is predicted.
        fed: tokens that have to be read.
        targets: tokens that are predicted.
    """
    return 4.0 * (body * fed + head * targets)


def weights(model: Any) -> tuple[int, int]:
    """Weights of the layers, and of the LM head ``V x H`` (tied to the input embedding or not)."""
    head = model.get_output_embeddings()
    outside = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    outside |= {id(p) for p in head.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside), head.weight.numel()
