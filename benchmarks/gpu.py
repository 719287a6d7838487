"""Foreword against PEFT on one CUDA card, in bfloat16: engines, populations, PEFT's guide as a job, and a 3B shape.

    .venv/bin/python benchmarks/gpu.py [--sections steps job large] [--shapes SmolLM2-135M bloomz-560m]

Needs no hub: models have random weights of the right shape and rows are random tokens of
realistic lengths (shapes.py). Contenders take turns in blocks of steps, waiting for the device
around a block only: Foreword's steps do not wait for it, PEFT's loop does, as published. Laying
out a block's rows and uploading them is part of its time. Figures are medians with their spread.

Writes DATE-gpu.json into benchmarks/results/. Without a card: --device cpu --tiny --out FOLDER,
a dry run whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from measure import alternate, ceilings, digits, peak_memory, seconds, summary, weights
from opponents import TRAINING, Opponent
from ours import SEED, Members, Setting, plan, whole_job
from results import FOLDER, facts, write
from shapes import SHAPES, backbone, reasoning, tweets
from suite import ratios, useful_flops

from foreword.backbone.load import Backbone
from foreword.config import TrainConfig
from foreword.errors import ForewordError

LARGE = "Llama-3.2-3B"
SMALL = tuple(name for name in SHAPES if name != LARGE)
ENGINES = ("eager", "graph", "compile")
SECTIONS = ("steps", "job", "large")
NO_CARD = "no CUDA device here: run this on a machine with a card, or --device cpu --tiny --out FOLDER as a dry run"
Run = Callable[[Sequence[int]], Any]
"""Runs the steps of these numbers."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are what the goals are about.

    Rows are whole batches, so that no smaller last batch is timed as if it were whole. ``epochs`` of the large
    shape make the 5,000 steps of PEFT's own benchmark, by which Foreword chooses its engine there.
    """

    batch: int = 8
    rows: int = 160
    virtual_tokens: int = 8
    populations: tuple[int, ...] = (4, 16)
    job_rows: int = 50
    job_epochs: int = 50
    held_out: int = 3399
    large_batch: int = 4
    large_rows: int = 200
    large_epochs: int = 100
    large_virtual_tokens: int = 200
    shrink: int = 1
    """What lengths of the large shape's rows are divided by."""
    block: int = 20
    """Steps of one timed run."""
    blocks: int = 3
    large_block: int = 10
    large_blocks: int = 2


TINY = Sizes(rows=16, job_rows=10, job_epochs=2, held_out=12, large_rows=8, large_epochs=20,
             large_virtual_tokens=5, shrink=4, block=2, blocks=1, large_block=2, large_blocks=1)  # fmt: skip


@dataclass
class Turns:
    """What contenders took in one comparison."""

    step: dict[str, dict[str, float]] = field(default_factory=dict)
    """Summaries in seconds a step, by contender."""
    failed: dict[str, str] = field(default_factory=dict)
    prepare_s: dict[str, float] = field(default_factory=dict)
    """Until an engine's first step, its trial steps included."""
    chosen: dict[str, str] = field(default_factory=dict)
    """Engine of each of Foreword's contenders."""
    layout: str = ""


def compare(
    setting: Setting,
    ours: Mapping[str, TrainConfig],
    count: int,
    opponents: Mapping[str, Opponent],
    sizes: Sizes,
    rounds: int,
) -> Turns:
    """Times Foreword's configurations ``ours``, as populations of ``count``, and opponents, in turns."""
    free(setting.device)
    found = Turns()
    blocks = [range(b * sizes.block, (b + 1) * sizes.block) for b in range(sizes.blocks)]
    with ExitStack() as stack:
        works: dict[str, Run] = {}
        for name, config in ours.items():
            try:
                made = Members(setting, config, count, stack)
                for block in [*blocks, *blocks]:  # a width's first pass is a plain one, its second is captured
                    made.run(block)
            except (ForewordError, RuntimeError) as e:
                found.failed[name] = (str(e).strip().splitlines() or [type(e).__name__])[0]
                continue
            works[name] = made.run
            found.prepare_s[name], found.chosen[name] = digits(made.prepare_s, 3), made.engine
            found.layout = made.layout
        config = next(iter(ours.values()))
        works |= {name: steps_of(opponent, setting, config) for name, opponent in opponents.items()}
        times = alternate(works, blocks, rounds, setting.device)
        found.step = {name: summary([t / sizes.block for t in spent]) for name, spent in times.items()}
        works.clear()
    return found


def steps_of(opponent: Opponent, setting: Setting, config: TrainConfig) -> Run:
    """An opponent's steps over the rows that Foreword's first member reads in the same steps."""
    order = plan(setting, config)

    def run(steps: Sequence[int]) -> None:
        for t in steps:
            opponent.step([setting.examples[i] for i in order.batch(SEED, t)])

    return run


def free(device: torch.device) -> None:
    """Gives back what the comparison before left: memory, and compiled code that would count for the next."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def steps_section(
    found: Backbone, sizes: Sizes, engines: Sequence[str], rounds: int, limits: Mapping[str, float]
) -> dict[str, Any]:
    """Step times of all engines and populations of a shape, against PEFT, and how far from the floor they are."""
    setting = tweets(found, sizes.rows, sizes.virtual_tokens, epochs=1000)
    configs = {name: TrainConfig(engine=name, epochs=1000, batch_size=sizes.batch) for name in engines}
    opponents = {name: TRAINING[name](setting) for name in ("guide", "best")}
    out: dict[str, Any] = {}
    populations = []
    for count in (1, *sizes.populations):
        turns = compare(setting, configs, count, opponents, sizes, rounds)
        ours = {name: turns.step[name] for name in turns.chosen}
        populations.append({
            "members": count, "step": turns.step, "failed": turns.failed, "prepare_s": turns.prepare_s,
            "ms_per_prompt": {n: digits(1e3 * s["median_s"] / count) for n, s in ours.items()},
            "ratio_per_prompt": {
                n: {o: digits(count * turns.step[o]["median_s"] / s["median_s"], 3) for o in opponents}
                for n, s in ours.items()
            },
        })  # fmt: skip
        if not ours:
            continue
        fastest = min(ours, key=lambda n: ours[n]["median_s"])
        if count == 1:
            section = {"foreword": ours[fastest], **{name: turns.step[name] for name in opponents}}
            out |= {"layout": turns.layout, "engine": fastest}
            out |= {"train_step": section, "train_step_ratio": ratios(section)}
            configs = {n: c for n, c in configs.items() if n in ours}
            configs = {n: c for n, c in configs.items() if n != "eager"} or configs
        else:
            out[f"population_{count}_ratio"] = populations[-1]["ratio_per_prompt"][fastest]
        if count == max(sizes.populations):
            out |= floor(setting, configs[fastest], sizes, count, ours[fastest]["median_s"], limits)
    return out | {"populations": populations}


def floor(
    setting: Setting, config: TrainConfig, sizes: Sizes, count: int, step: float, limits: Mapping[str, float]
) -> dict[str, Any]:
    """The least a step of a population could take here in seconds, and its share of the measured one.

    The larger of two floors: reading all weights of layers and head twice (forward, backward) at
    the speed of a copy, and the useful operations of all members at that of a matrix product.
    """
    body, head = weights(setting.model)
    read = 2 * (body + head) * setting.dtype.itemsize / limits["copy"]
    order = plan(setting, config)
    flops = 0.0
    for t in range(sizes.block * sizes.blocks):
        for k in range(count):
            batch = [setting.examples[i] for i in order.batch(SEED + k, t)]
            flops += useful_flops(batch, len(setting.opening), len(setting.rows), body, head)
    work = flops / (sizes.block * sizes.blocks) / limits[str(setting.dtype).removeprefix("torch.")]
    return {
        "floor": {"members": count, "bytes_s": digits(read), "flops_s": digits(work), "step_s": step},
        "floor_ratio": {"floor": digits(max(read, work) / step, 3)},
    }


def job_section(found: Backbone, sizes: Sizes, guide_epochs: int) -> dict[str, Any]:
    """PEFT's guide from its first step to its last: all epochs of Foreword, some of PEFT, scaled linearly."""
    free(found.device)
    setting = tweets(found, sizes.job_rows, sizes.virtual_tokens, sizes.job_epochs)
    held_out = tweets(found, sizes.held_out, sizes.virtual_tokens, 1).examples
    # The guide reports its loss on the held-out rows after every epoch; to look at it costs what choosing by it does.
    config = TrainConfig(epochs=sizes.job_epochs, batch_size=sizes.batch, select="loss")
    guide = TRAINING["guide"](setting)
    order = plan(setting, config)
    run = steps_of(guide, setting, config)
    batches = [held_out[i : i + sizes.batch] for i in range(0, len(held_out), sizes.batch)]
    run([0])
    guide.score(batches[:1], setting.label_ids)

    def epoch(number: int) -> None:
        run(range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch))
        guide.score(batches, setting.label_ids)

    epochs = [seconds(lambda: epoch(e), found.device) for e in range(guide_epochs)]  # noqa: B023 (called at once)
    theirs = sum(epochs) / guide_epochs * sizes.job_epochs
    job: dict[str, Any] = {}
    mine = seconds(lambda: job.update(whole_job(setting, held_out, config)), found.device)
    section = {
        "foreword": summary([mine]) | {"engine": job["engine"], "step_s": digits(job["step_s"])},
        "guide": summary([theirs]) | {"epoch": summary(epochs), "scaled_from_epochs": guide_epochs},
    }
    return {
        "guide_job": section, "guide_job_ratio": ratios(section),
        "guide_job_size": {"rows": sizes.job_rows, "epochs": sizes.job_epochs, "scored_rows": sizes.held_out},
    }  # fmt: skip


def large_section(found: Backbone, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """The shape of PEFT's own benchmark: step time and peak memory, against prompt tuning and LoRA."""
    setting = reasoning(found, sizes.large_rows, sizes.large_virtual_tokens, sizes.large_epochs, sizes.shrink)
    plain = TrainConfig(epochs=sizes.large_epochs, batch_size=sizes.large_batch)
    recompute = TrainConfig(epochs=sizes.large_epochs, batch_size=sizes.large_batch, recompute=True)
    ours = {"foreword": plain, "recompute": recompute}
    few = replace(sizes, block=sizes.large_block, blocks=sizes.large_blocks)
    peaks = {name: peak(found.device, our_steps(setting, config)) for name, config in ours.items()}
    opponents = {name: TRAINING[name](setting) for name in ("best", "lora32")}
    hard = [longest_step(setting, plain)]
    for name, opponent in opponents.items():
        run = steps_of(opponent, setting, plain)
        peaks[name] = peak(found.device, lambda: run(hard * 3))  # noqa: B023 (called at once)
    first = compare(setting, {"foreword": plain}, 1, opponents, few, rounds)
    second = compare(setting, {"recompute": recompute}, 1, {"best": opponents["best"]}, few, rounds)
    section = first.step | {n: s for n, s in second.step.items() if n == "recompute"}
    known = {name: mb["peak"] for name, mb in peaks.items() if mb.get("peak")}
    reserved = {name: mb["reserved"] for name, mb in peaks.items() if "reserved" in mb}
    out: dict[str, Any] = {
        "layout": first.layout, "engines": first.chosen | second.chosen, "failed": first.failed | second.failed,
        "prepare_s": first.prepare_s | second.prepare_s, "train_step": section, "peak_memory_mb": known,
        "reserved_memory_mb": reserved,
    }  # fmt: skip
    if "foreword" in section:
        out["train_step_ratio"] = ratios(section)
    if "foreword" in known:
        out["memory_ratio"] = {n: digits(known["foreword"] / mb, 3) for n, mb in known.items() if n != "foreword"}
    return out


def longest_step(setting: Setting, config: TrainConfig) -> int:
    """The step of the first epoch that reads most tokens as padded rows: the one with the longest row."""
    order = plan(setting, config)
    length = [len(e.context) + len(e.target) for e in setting.examples]
    return max(range(order.steps_per_epoch), key=lambda t: max(length[i] for i in order.batch(SEED, t)))


def our_steps(setting: Setting, config: TrainConfig) -> Callable[[], None]:
    """Foreword from the making of its engine over the longest step, plain, captured and replayed.

    A replayed graph allocates nothing; what it holds was taken when it was captured, so the
    engine's own making has to be looked at. The copy of the backbone is not counted (``peak``).
    """

    def run() -> None:
        with ExitStack() as stack:
            made = Members(setting, config, 1, stack, own=False)
            made.run([longest_step(setting, config)] * 3)

    return run


def peak(device: torch.device, work: Callable[[], Any]) -> dict[str, float]:
    """Peak MB of a piece of work above what was held before it; empty where it fails or cannot be measured.

    ``peak``: as ``measure.peak_memory``. ``reserved`` (CUDA): what torch's allocator took from the
    card, with the pools that captured graphs keep and what no longer fits anywhere.
    """
    free(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_reserved(device) if cuda else 0
    try:
        found = peak_memory(work, device, runs=1)
    except (ForewordError, RuntimeError) as e:
        print(f"peak memory: {e}", file=sys.stderr)
        return {}
    out = {} if found is None else {"peak": found}
    return out | ({"reserved": digits((torch.cuda.max_memory_reserved(device) - before) / 1e6)} if cuda else {})


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    made.add_argument("--shapes", nargs="+", choices=SMALL, default=list(SMALL), help="of the sections steps and job")
    made.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="of the section steps")
    made.add_argument("--rounds", type=int, default=3, help="timed passes over the blocks, after one to warm up")
    made.add_argument("--guide-epochs", type=int, default=5, help="epochs of PEFT's job that are run and scaled")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--tiny", action="store_true", help="tiny models and few rows: a dry run")
    made.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    made.add_argument("--name", default="", help="added to the file's name; without it a day has one file")
    return made


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as the results file holds them."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = TINY if args.tiny else Sizes()
    limits = ceilings(device)
    results = []
    for name in args.shapes if {"steps", "job"} & set(args.sections) else ():
        found = backbone(name, device, dtype, args.tiny)
        entry = {"model": name, "virtual_tokens": sizes.virtual_tokens}
        if "steps" in args.sections:
            entry |= steps_section(found, sizes, args.engines, args.rounds, limits)
        if "job" in args.sections:
            entry |= job_section(found, sizes, args.guide_epochs)
        results.append(entry)
        del found
        tell(entry)
    if "large" in args.sections:
        found = backbone(LARGE, device, dtype, args.tiny)
        entry = {"model": LARGE, "virtual_tokens": sizes.large_virtual_tokens, "batch_size": sizes.large_batch}
        results.append(entry | large_section(found, sizes, args.rounds))
        tell(results[-1])
    return {
        **facts(device), "kind": "gpu", "dtype": str(dtype).removeprefix("torch."), "seed": SEED,
        "model": ("tiny models" if args.tiny else "models") + " of random weights", "rows": "random tokens",
        "row_count": sizes.rows, "batch_size": sizes.batch, "rounds": args.rounds, "steps_per_run": sizes.block,
        "ceilings": limits, "results": results,
    }  # fmt: skip


def tell(entry: Mapping[str, Any]) -> None:
    """A line of ratios."""
    print(
        json.dumps({k: v for k, v in entry.items() if k.endswith(("ratio", "model", "engine", "failed"))}), flush=True
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures, prints a line a shape, and returns the file written; exit code 2 without a card."""
    options = parser()
    args = options.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(NO_CARD, file=sys.stderr)
        raise SystemExit(2)
    if args.device == "cpu" and args.out == FOLDER:
        options.error("--device cpu is a dry run: give it another --out")
    path = write(run(args), args.out, args.name)
    print(f"wrote {path.name}")
    return path


if __name__ == "__main__":
    main()
