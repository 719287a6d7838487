"""What is measured: training steps, memory and scoring of every contender, for each size of soft prompt."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from measure import alternate, ceilings, digits, median_rate, peak_memory, step_flops, summary, weights
from opponents import NAMES, SCORING, TRAINING, Opponent, PerClass
from ours import SEED, Batch, Foreword, Setting, load, prepare
from results import data_name, facts
from startup import measure_startup

BATCH = 8
MEMORY_RUNS = 3
Contenders = Mapping[str, Foreword | Opponent]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a run of the suite."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--data", default="bundled:complaints")
    made.add_argument("--text", default="text", help="input column")
    made.add_argument("--label", default="label", help="label column")
    made.add_argument("--virtual-tokens", type=int, nargs="+", default=[8, 100])
    made.add_argument("--rounds", type=int, default=3, help="timed passes over the rows, after one to warm up")
    made.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES), help="opponents of Foreword")
    made.add_argument("--startup-runs", type=int, default=3, help="0: leave start-up out")
    return made


def run(args: argparse.Namespace, device: str, dtype: str) -> dict[str, Any]:
    """All figures of one run, as the results file holds them."""
    backbone = load(args.model, device, dtype)
    limits = ceilings(backbone.device)
    results, row_count = [], 0
    for virtual_tokens in args.virtual_tokens:
        # One round to warm up, and one more for the steps whose memory is measured.
        setting = prepare(backbone, args.data, args.text, args.label, virtual_tokens, args.rounds + 2)
        results.append(measure(setting, args.contenders, args.rounds, limits))
        row_count = len(setting.examples)
    began = {}
    if args.startup_runs:
        began["startup"] = measure_startup(args.model, args.data, args.text, args.label, device, args.startup_runs)
    return {
        **facts(backbone.device), "dtype": str(backbone.dtype).removeprefix("torch."), "seed": SEED,
        "model": data_name(args.model), "rows": data_name(args.data), "row_count": row_count,
        "batch_size": BATCH, "rounds": args.rounds, "ceilings": limits, **began, "results": results,
    }  # fmt: skip


def measure(setting: Setting, opponents: Sequence[str], rounds: int, limits: Mapping[str, float]) -> dict[str, Any]:
    """All sections of one size of soft prompt."""
    ours = Foreword(setting)
    found: dict[str, Any] = {"virtual_tokens": len(setting.rows), "layout": ours.layout.train}
    contenders: Contenders = {ours.name: ours} | {n: TRAINING[n](setting) for n in opponents if n in TRAINING}
    found |= training(setting, contenders, rounds, limits)
    if not setting.label_ids:
        return found  # free text has no classes to score
    scorers = {n: c for n, c in contenders.items() if n in (ours.name, *SCORING)}
    found |= scoring("scoring", setting, scorers, setting.label_ids, rounds)
    if PerClass.name in opponents:
        pair: dict[str, Foreword | PerClass] = {ours.name: ours, PerClass.name: PerClass(setting)}
        found |= scoring("two_class_scoring", setting, pair, setting.label_ids[:2], rounds)
    return found


def training(setting: Setting, contenders: Contenders, rounds: int, limits: Mapping[str, float]) -> dict[str, Any]:
    """Step times with tokens per second and the share of the ceiling, ratios, and peak memory."""
    batches = whole_batches(setting.examples)
    times = alternate({n: c.step for n, c in contenders.items()}, batches, rounds, setting.device)
    body, head = weights(setting.model)
    text = [sum(len(e.context) + len(e.target) for e in batch) for batch in batches] * rounds
    section: dict[str, Any] = {}
    for name, c in contenders.items():
        flops = [useful_flops(batch, len(setting.opening), c.virtual_tokens, body, head) for batch in batches] * rounds
        limit = limits[str(c.dtype).removeprefix("torch.")]
        section[name] = summary(times[name]) | {
            "tokens_per_s": median_rate(text, times[name]),
            "flops_share": digits(median_rate(flops, times[name]) / limit),
        }
    found = {"train_step": section, "train_step_ratio": ratios(section)}
    return found | memory(contenders, max(batches, key=lambda b: sum(len(e.context) for e in b)), setting.device)


def useful_flops(batch: Batch, opening: int, virtual_tokens: int, body: int, head: int) -> float:
    """``measure.step_flops`` of the least that must be read: soft prompt and common opening once, no
    padding, no target's last token. The same for all contenders, but LoRA has no soft prompt.
    """
    own = sum(len(e.context) - opening + len(e.target) - 1 for e in batch)
    return step_flops(body, head, virtual_tokens + opening + own, sum(len(e.target) for e in batch))


def memory(contenders: Contenders, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Peak MB above the level before a step on the longest batch, and Foreword's part of each opponent's."""
    found = {n: peak_memory(lambda: c.step(batch), device, MEMORY_RUNS) for n, c in contenders.items()}  # noqa: B023
    peaks = {n: mb for n, mb in found.items() if mb is not None}
    if not peaks:
        return {}
    ours = peaks[Foreword.name]
    parts = {n: digits(ours / mb, 3) for n, mb in peaks.items() if n != Foreword.name and mb}
    return {"peak_memory_mb": peaks, "memory_ratio": parts}


def scoring(
    key: str,
    setting: Setting,
    scorers: Mapping[str, Foreword | Opponent | PerClass],
    label_ids: Sequence[tuple[int, ...]],
    rounds: int,
) -> dict[str, Any]:
    """Times of scoring all rows, with the ratios."""
    rows = setting.examples
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    works = {n: lambda all_, c=c: c.score(all_, label_ids) for n, c in scorers.items()}
    times = alternate(works, [batches], rounds, setting.device)
    section = {n: summary(t) for n, t in times.items()}
    return {key: section, f"{key}_ratio": ratios(section)}


def ratios(section: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each opponent's median over Foreword's: how many times as fast Foreword is."""
    ours = section[Foreword.name]["median_s"]
    return {n: digits(s["median_s"] / ours, 3) for n, s in section.items() if n != Foreword.name}


def whole_batches(rows: Sequence[Any]) -> list[Sequence[Any]]:
    """Batches of eight rows without a smaller last one, which would be timed as if it were whole."""
    whole = [rows[i : i + BATCH] for i in range(0, len(rows) - BATCH + 1, BATCH)]
    return whole or [rows]
