"""docs/methods.md, from the newest result of benchmarks/methods.py.

.venv/bin/python benchmarks/methods_table.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import FOLDER, newest

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
FACTS: dict[str, tuple[str, str]] = {
    "prompt-tuning": ("the rows", "the default: smallest, and read by every server that takes embeddings"),
    "p-tuning (mlp)": (
        "rows and a three-layer encoder over them",
        "its paper's long trainings; behind at so few steps",
    ),
    "p-tuning (lstm)": ("rows and a two-layer LSTM over them", "the same"),
    "residual": ("rows and a shared bottleneck that is added", "its paper's long trainings; not ahead here"),
    "low-rank": ("two factors of the rows", "many virtual tokens: numbers grow with P + H, not P x H"),
    "prefix-tuning": ("keys and values of every layer, from a text's", "several classes; nothing to read at a request"),
    "prefix-tuning (projection)": (
        "a network that makes keys and values",
        "the same, with 30 times the numbers to train",
    ),
    "prefix-tuning (random start)": ("keys and values, from random rows", "where there is no text to start from"),
    "context-tuning": (
        "keys and values that reading some of the rows leaves",
        "few rows; `foreword tune` tries it first",
    ),
    "multitask": ("rows times low-rank factors", "targets that start from several source tasks"),
    "cpt": ("small moves of few-shot examples' rows", "examples that already work, no room to overfit"),
    "cartridge": ("keys and values but the first token's", "long texts: `foreword distill`"),
}
"""What is trained, and where a variant is worth trying."""
HEAD = """\
# The family of soft prompts

<!-- made by benchmarks/methods_table.py from benchmarks/results; do not edit -->

A method is `prompt.method`, one file under `src/foreword/prompts/methods/` with its paper on top. All share data,
training, populations, scoring, resuming and the adapter folder; what differs is what the optimiser changes.
"""


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *_methods(result), "", *_scores(result), "", *_reading(result)]) + "\n"


def _methods(result: Mapping[str, Any]) -> Iterator[str]:
    yield "| method | what is trained | numbers trained | file | PEFT type | read at each request | where it wins |"
    yield "|---|---|---|---|---|---|---|"
    for variant, (what, wins) in FACTS.items():
        run = next((r for r in result["runs"] if r["variant"] == variant), None)
        if run is None:
            continue
        cost = f"{run['read_each_time']} tokens" if run["read_each_time"] else f"{run['virtual_tokens']} cached"
        size = f"{run['file_bytes'] / 1000:,.0f} kB"
        yield f"| {variant} | {what} | {run['trainable']:,} | {size} | {run['peft_type']} | {cost} | {wins} |"


def _scores(result: Mapping[str, Any]) -> Iterator[str]:
    sources = list(dict.fromkeys(r["data"] for r in result["runs"]))
    yield f"## Measured: {result['model']}, {_machine(result)}"
    yield ""
    for name in sources:
        run = next(r for r in result["runs"] if r["data"] == name)
        yield (
            f"- **{name}**: {run['rows']} training rows, {run['steps']} steps of 8 rows, scored on "
            f"{run['test_rows']} test rows."
        )
    yield ""
    columns = [f"{name} accuracy | {name} macro-F1" for name in sources]
    yield f"| method | learning rate | {' | '.join(columns)} |"
    yield "|---" * (2 + 2 * len(sources)) + "|"
    for variant in FACTS:
        mine = [r for r in result["runs"] if r["variant"] == variant]
        if mine:
            cells = [_cells([r for r in mine if r["data"] == name]) for name in sources]
            yield f"| {variant} | {mine[0]['lr']:g} | {' | '.join(cells)} |"


def _cells(runs: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy and macro-F1 over the seeds: mean, and the range of several."""
    if not runs:
        return " | "
    parts = []
    for key in ("accuracy", "macro_f1"):
        values = [r[key] for r in runs]
        spread = f" [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else ""
        parts.append(f"{statistics.mean(values):.3f}{spread}")
    return " | ".join(parts)


def _machine(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{threads} of {machine['cpu']}, {result.get('dtype', 'float32')}, {result['date']}"


def _reading(result: Mapping[str, Any]) -> Iterator[str]:
    seeds = sorted({r["seed"] for r in result["runs"]})
    most = max(len([r for r in result["runs"] if (r["data"], r["variant"]) == pair]) for pair in _pairs(result))
    count = result["runs"][0]["test_rows"]
    yield f"Draws of training rows: {', '.join(map(str, seeds))}; up to {most} a cell, in brackets the range over them."
    yield f"One on {count} test rows is good to about 0.06: read differences below that as none."
    yield "Rates: each method's default on that day."
    yield "*Cached* tokens cost attention over their keys and values and no forward pass; `foreword compile` makes rows"
    yield "into such a prefix without training it again."


def _pairs(result: Mapping[str, Any]) -> set[tuple[str, str]]:
    return {(r["data"], r["variant"]) for r in result["runs"]}


if __name__ == "__main__":
    PAGE.write_text(page(newest(FOLDER, "methods")[0]))
