"""docs/speed.md, from the newest result of each kind.

.venv/bin/python benchmarks/table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import FOLDER, Result, newest

PAGE = Path(__file__).parent.parent / "docs" / "speed.md"
CONTENDERS = {
    "foreword": ("**Foreword**", ""),
    "guide": ("PEFT guide", "prompt tuning as PEFT's guide has it, every row padded on the left to 64 tokens"),
    "best": ("PEFT best", "the same padded to the batch's longest row, without a cache in training, bf16 on CUDA"),
    "lora8": ("PEFT LoRA r = 8", "LoRA in PEFT's default modules, otherwise as PEFT best"),
    "lora32": ("PEFT LoRA r = 32", "the same with rank 32"),
    "per-class": ("PEFT, class by class", "scoring by one padded row for each row and class"),
    "recompute": ("Foreword, recompute", "Foreword with activations recomputed (train.recompute)"),
    "floor": ("floor", "the larger of reading the weights twice at a copy's speed and useful work at a product's"),
}
"""Name and description of each contender, in the order of the tables."""
GOALS: dict[str, list[tuple[str, str, str, int | None, float, float]]] = {
    "cpu": [
        ("step", "train_step_ratio", "guide", 8, 2.0, 2.4),
        ("step", "train_step_ratio", "guide", 100, 3.5, 4.2),
        ("scoring", "scoring_ratio", "guide", 8, 2.0, 2.6),
        ("scoring", "scoring_ratio", "guide", 100, 4.0, 5.0),
        ("two-class scoring", "two_class_scoring_ratio", "per-class", None, 4.0, 6.0),
        ("step's peak memory above the weights", "memory_ratio", "guide", None, 0.6, 0.4),
    ],
    "gpu": [
        ("step", "train_step_ratio", "guide", 8, 10, 20),
        ("step for each of 16 soft prompts", "population_16_ratio", "guide", 8, 50, 110),
        ("floor over step, 16 soft prompts", "floor_ratio", "floor", 8, 0.2, 0.5),
        ("PEFT's guide as a job", "guide_job_ratio", "guide", 8, 20, 50),
        ("step", "train_step_ratio", "best", 200, 2.2, 3),
        ("step", "train_step_ratio", "lora32", 200, 2.5, 3),
        ("step's peak memory above the weights", "memory_ratio", "best", 200, 0.4, 0.4),
    ],
}
"""What the project promises by kind: words, section, opponent, P (None: every P), must, aim."""
HEAD = ("model", "P", "contender")
PLAIN = ("memory_ratio", "floor_ratio")
"""Ratios that are shares, not how many times as fast."""
HOW = """\
Foreword and its opponents take turns batch by batch in one process: the same rows, the same loaded backbone, the
same precision. Figures are medians [minimum, maximum] over all timed runs, after one round to warm up. **x** is the
opponent's median over Foreword's: how many times as fast Foreword is."""
COLUMNS = {
    "tokens_per_s": """\
- *tokens/s*: the batch's own text tokens (no padding, no virtual tokens) by the time, the same numerator for all.""",
    "flops_share": """\
- *of peak*: useful floating-point operations by the time, as a share of the machine's measured matrix product in the
  same type. Useful is 4 (N F + H V M) for a step: N weights outside embeddings and head, F tokens that have to be
  read (soft prompt and the template's opening once, then each row's own), H V weights of the head, M predicted
  tokens; two operations a weight and token forward, two backward with respect to activations. Padding, copies of the
  soft prompt and unread logits are no useful work, so who does them has a lower share. LoRA reads no soft prompt.""",
    "peak_memory_mb": """\
- *peak MB*: memory (1e6 bytes) at the peak of a step on the longest batch above the level before it (weights,
  optimiser); resident memory on the CPU, torch's allocator on CUDA; in steps of their own, which are not timed.""",
}
"""How the columns that some results have are measured."""


def page(results: Sequence[Result]) -> str:
    """The whole page from one result a kind; sections and columns a result lacks are left out."""
    names = ", ".join(f"[{r['file']}](../benchmarks/results/{r['file']})" for r in results)
    content = json.dumps(results)
    lines = [
        "# Speed", "",
        "`make bench` measures, `make bench-compare` says what got slower, `make bench-table` writes this page from",
        f"{names or 'no results yet'}.", "",
        HOW, "",
        *(text for key, text in COLUMNS.items() if f'"{key}"' in content),
        *(f"- **{CONTENDERS[c][0]}**: {CONTENDERS[c][1]}." for c in opponents(results)),
    ]  # fmt: skip
    for result in results:
        lines += ["", *section(result)]
    return "\n".join(lines) + "\n"


def opponents(results: Sequence[Result]) -> list[str]:
    """Opponents that occur anywhere in the results, in the order of the tables."""
    parts = [part for r in results for size in r["results"] for part in size.values() if isinstance(part, Mapping)]
    return [c for c in CONTENDERS if c != "foreword" and any(c in part for part in parts)]


def section(result: Result) -> Iterator[str]:
    """One kind of machine."""
    unit, factor = ("s", 1.0) if result["kind"] == "cpu" else ("ms", 1e3)
    yield f"## {result['kind'].upper()}, {result['dtype']}: {result['model']}"
    yield ""
    yield from facts(result)
    yield from goals(result)
    yield from steps(result, unit, factor)
    for title, key in (
        (f"Scoring all {result['row_count']} rows", "scoring"),
        (f"Two-class scoring, {result['row_count']} rows", "two_class_scoring"),
    ):
        yield from scoring(result, title, key, unit, factor)
    yield from engines(result)
    yield from jobs(result)
    yield from startup(result)


def facts(result: Result) -> Iterator[str]:
    """Where, when and with what it was measured."""
    machine, versions = result["machine"], result["versions"]
    where = ", ".join(str(machine[k]) for k in ("gpu", "cpu", "arch") if k in machine)
    yield f"{result['date']}; {where}, threads {machine['threads']}; {result['row_count']} rows of {result['rows']},"
    yield f"batches of {result['batch_size']}, {result['rounds']} timed rounds, seed {result['seed']};"
    yield ", ".join(f"{name} {number}" for name, number in versions.items()) + "."
    if limits := result.get("ceilings"):
        yield f"Measured ceilings: float32 {limits['float32'] / 1e9:.4g} GFLOP/s, bfloat16"
        yield f"{limits['bfloat16'] / 1e9:.4g} GFLOP/s, memory copy {limits['copy'] / 1e9:.3g} GB/s (read and written)."
    if note := result.get("note"):
        yield f"Note: {note}."


def goals(result: Result) -> Iterator[str]:
    """The promised ratios beside the measured ones."""
    rows = []
    for words, key, opponent, wanted, must, aim in GOALS.get(result["kind"], []):
        for size in result["results"]:
            value = size.get(key, {}).get(opponent)
            if value is None or wanted not in (None, size["virtual_tokens"]):
                continue
            unit = "" if key in PLAIN else "x"
            met = verdict(value, must, aim, small=key == "memory_ratio")
            figures = [f"{number(value)}{unit}", f"{must}{unit}", f"{aim}{unit}", met]
            where = ", ".join(filter(None, [words, size.get("model"), f"P = {size['virtual_tokens']}"]))
            rows.append([where, CONTENDERS[opponent][0], *figures])
    yield from table("Against the goals", ["figure", "against", "measured", "must", "aim", "verdict"], rows)


def verdict(value: float, must: float, aim: float, small: bool) -> str:
    """In words; ``small``: the smaller, the better."""
    sign = -1 if small else 1
    return "aim met" if sign * value >= sign * aim else "must met" if sign * value >= sign * must else "**missed**"


def steps(result: Result, unit: str, factor: float) -> Iterator[str]:
    """Training steps, with memory where it was measured."""
    rows = []
    for size in result["results"]:
        times, memory = size.get("train_step", {}), size.get("peak_memory_mb", {})
        for c in contenders(times):
            rates = [shown(times[c].get("tokens_per_s"), ".0f"), shown(times[c].get("flops_share"), ".0%")]
            rows.append([*timed(size, "train_step", c, factor), *rates, shown(memory.get(c), ".0f")])
    head = [*HEAD, unit, "x", "runs", "tokens/s", "of peak", "peak MB"]
    yield from table(f"Training step, batches of {result['batch_size']} rows", head, rows)


def engines(result: Result) -> Iterator[str]:
    """Steps of every engine and size of population, and those that did not work."""
    rows, failed = [], []
    for size in result["results"]:
        for group in size.get("populations", []):
            first = [size["model"], str(size["virtual_tokens"]), str(group["members"])]
            for engine, each in group["ms_per_prompt"].items():
                times = [number(group["ratio_per_prompt"][engine][o]) for o in ("guide", "best")]
                took = group["step"][engine]
                rows.append([*first, engine, spread(took, 1e3), number(each), *times, str(took["runs"])])
            failed += [f"{first[0]}, K = {first[2]}: {n} did not work: {why}." for n, why in group["failed"].items()]
    head = ["model", "P", "K", "engine", "ms a step", "ms a soft prompt", "x guide", "x best", "runs"]
    yield from table("Engines and populations of K soft prompts", head, rows)
    if failed:
        yield from ("", *(f"- {line}" for line in failed))


def jobs(result: Result) -> Iterator[str]:
    """A whole training with scoring after every epoch."""
    rows = []
    for size in result["results"]:
        for c in contenders(size.get("guide_job", {})):
            epochs = size["guide_job"][c].get("scaled_from_epochs")
            rows.append([*timed(size, "guide_job", c, 1.0), f"{epochs} epochs, scaled" if epochs else "all epochs"])
    yield from table("PEFT's guide as a job", [*HEAD, "s", "x", "runs", "measured"], rows)


def scoring(result: Result, title: str, key: str, unit: str, factor: float) -> Iterator[str]:
    """One of the two kinds of scoring."""
    rows = [timed(size, key, c, factor) for size in result["results"] for c in contenders(size.get(key, {}))]
    yield from table(title, [*HEAD, unit, "x", "runs"], rows)


def startup(result: Result) -> Iterator[str]:
    """How long a user waits."""
    words = {"help": "`foreword --help`", "first_step": "`foreword train` to its first step (model in the cache)"}
    found = result.get("startup", {})
    rows = [[words[k], spread(found[k], 1.0), str(found[k]["runs"])] for k in words if k in found]
    yield from table("Start-up", ["command", "s", "runs"], rows)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A titled table without the columns that no row has a value for; nothing without rows."""
    if not rows:
        return
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[row[i] for i in kept] for row in (head, ["---"] * len(head), *rows)]
    yield from ("", f"### {title}", "", *(f"| {' | '.join(line)} |" for line in lines))


def timed(size: Mapping[str, Any], key: str, contender: str, factor: float) -> list[str]:
    """The columns of HEAD, time, how many times Foreword's time that is, and runs."""
    summary, ratio = size[key][contender], size.get(f"{key}_ratio", {}).get(contender)
    times = "" if ratio is None else number(ratio)
    model = size.get("model", "") + (f", batches of {size['batch_size']}" if "batch_size" in size else "")
    first = [model, str(size["virtual_tokens"]), CONTENDERS[contender][0]]
    return [*first, spread(summary, factor), times, str(summary["runs"])]


def contenders(times: Mapping[str, Any]) -> list[str]:
    """Those timed, in the order of the tables."""
    return [c for c in CONTENDERS if c in times]


def spread(summary: Mapping[str, float], factor: float) -> str:
    """Median [minimum, maximum]."""
    middle, low, high = (number(summary[k] * factor) for k in ("median_s", "min", "max"))
    return f"{middle} [{low}, {high}]"


def number(value: float) -> str:
    """Three significant digits, zeros included."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:.0f}"


def shown(value: float | None, form: str) -> str:
    """A figure, or nothing where it was not measured."""
    return "" if value is None else format(value, form)


def sources(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The newest result of each kind."""
    return [found[0] for kind in ("cpu", "gpu") if (found := newest(folder, kind))]


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(sources()))
    print(f"wrote docs/{PAGE.name}")


if __name__ == "__main__":
    main()
