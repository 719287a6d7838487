"""docs/scale.md, from the newest results of benchmarks/scale.py and large.py and the counts of scale_model.py.

.venv/bin/python benchmarks/scale_table.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import FOLDER, newest
from scale_model import Collective, Machine, Shape, Step, best, flops, gathers, gradients, memory, seconds, sums

from foreword.parallel.layout import Layout, parse_layout

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BUDGET = 16384
"""Tokens of one pass on a GPU, as train.token_budget has it."""
H100 = Machine("H100", flops=2e14, inside=3e11, across=4e10, latency=1e-5, per_machine=8, memory=72e9)
MODELS = (
    Shape("Llama-3.2-1B", 16, 2048, 8192, 512, 128256, tied=True),
    Shape("Llama-3.1-8B", 32, 4096, 14336, 1024, 128256),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 1024, 128256),
    Shape("Llama-3.1-405B", 126, 16384, 53248, 1024, 128256),
)
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
ROWS, TOKENS, TARGETS, VIRTUAL = 1024, 200, 8, 16
LINE = "torchrun --nproc-per-node 8 -m foreword train --model M --data rows.csv --text text --label label --out runs/x"
HEAD = f"""\
# Several processes, large models

<!-- made by benchmarks/scale_table.py from benchmarks/results; do not edit -->

What is trained has 10^4 to 10^6 numbers, and the backbone is frozen. So several processes have little to tell each
other: the sum of one small gradient a step. What the backbone itself sends, when it is spread, is transformers' and
torch's own (`DistributedConfig`: FSDP2 and tensor parallelism).

    {LINE}
    ... train.parallel="tp=2,fsdp=4"      # 8 processes that share one backbone
    ... train.parallel="fsdp=8"           # on two machines: ddp=2 copies of it (HSDP)

| `train.parallel` | each process has | rows of a step | sent in a step |
|---|---|---|---|
| nothing, or `ddp=N` | the whole backbone | its share | the gradient of what is trained |
| `fsdp=N` | a part of every weight | its share | the same, and every weight twice to everyone |
| `tp=N` | a part of every layer | all | the same, and activations: 7 sums a layer |
| `ddp=N,fsdp=M` (HSDP) | a part of a copy | its share | as `fsdp=M` inside a copy |
| `tp=N,fsdp=M` | a part of a part | its share, together with N-1 others | both |

Recipe, data order, result: the same as with one process, whatever the layout (tests: losses and gradients of every
step within 1e-5, with 2 and 4 processes, packed rows, prefixes, populations, recomputed activations, accumulation).
The rows of a step are divided, not multiplied: `train.batch_size` means what it means alone. Rows to score (validation,
held-out rows, baselines, the report's) are divided too, except where weights are spread (`fsdp`), whose processes must
all pass through them equally often. Only the first process writes. A checkpoint goes on with any number of processes,
and with as many as before to the last bit.
"""
LOST = """\
## When a process is lost

A killed process is noticed by the others at once, one that hangs after `train.collective_minutes` (10). Then the run
ends with one error and the last checkpoint (one a second, or every `train.checkpoint_every` steps); the same command
with `--resume` goes on. Ctrl-C and SIGTERM stop all processes after the same step.

## Clusters

SLURM, two machines with eight cards:

    #!/bin/bash
    #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --signal=TERM@120 --requeue
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    srun torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$head:29500" \\
      -m foreword train recipe.yaml --out runs/x --resume train.parallel=fsdp=8

`--resume` in an empty folder starts the run, so a requeued job is the same job. The run folder must be on a disk that
the first machine keeps; the data must be readable on all.

SkyPilot:

    resources: {accelerators: "H100:8"}
    num_nodes: 2
    setup: pip install foreword
    run: |
      torchrun --nnodes $SKYPILOT_NUM_NODES --node-rank $SKYPILOT_NODE_RANK --nproc-per-node 8 \\
        --master-addr $(echo "$SKYPILOT_NODE_IPS" | head -n 1) --master-port 29500 \\
        -m foreword train recipe.yaml --out /checkpoints/x --resume train.parallel=fsdp=8

Neither script was run for this page: there was one machine of two cores. The commands inside them were.

## Searches

`torchrun --nproc-per-node N -m foreword tune ...` gives every process trainings of its own: a fold of a candidate, or
a member. Nothing is sent but their outcomes, and the search is the one that a single process makes (a test compares
trials and members). Who has no training waits for the others as long as theirs take: there only a killed process is
noticed, not one that hangs. The ensemble's scores and report are the first process's. With a backbone that is spread
(`fsdp`, `tp`) all processes train one after the other together.
`foreword tune --ray auto` does the same on a Ray cluster (`pip install 'foreword[ray]'`), `--ray local` on this
machine; `tune.ray_workers` says how many trainings at a time.

## What is not there

- Captured and compiled steps (`train.engine`) are for one process: several take plain steps.
- A backbone in 4 or 8 bits is not spread; each process has a copy (`ddp`).
- Expert and pipeline parallelism: transformers' pipeline has no backward pass.
"""


def page(result: Mapping[str, Any], large: Mapping[str, Any]) -> str:
    """The whole page: of a result of scale.py and one of large.py."""
    parts = [HEAD, *_sent(result), "", *_measured(result), "", *_memory(), "", *_large(large), "", *_grown(), "", LOST]
    return "\n".join(parts)


def shape_of(result: Mapping[str, Any]) -> Shape:
    """The measured backbone."""
    s = result["shape"]
    return Shape(
        "", s["num_hidden_layers"], s["hidden_size"], s["intermediate_size"],
        s["num_key_value_heads"] * s["head_dim"], s["vocab_size"], s["num_key_value_heads"],
        s["tie_word_embeddings"], width=4, queries=s["num_attention_heads"] * s["head_dim"],
    )  # fmt: skip


def step_of(result: Mapping[str, Any], layout: Layout) -> Step:
    """What a reader read in the measured steps."""
    step = result["step"]
    rows = step["batch_size"] // layout.readers
    fed = step["virtual_tokens"] + rows * (step["tokens"] - 1)  # the last target is not read
    return Step(fed, rows * step["targets"], step["virtual_tokens"] * result["shape"]["hidden_size"])


def predicted(result: Mapping[str, Any], layout: Layout) -> list[Collective]:
    """What the counts say of a measured layout."""
    shape, step = shape_of(result), step_of(result, layout)
    return [*gradients(step, layout), *gathers(shape, step, layout), *sums(shape, step, layout)]


def machine_of(result: Mapping[str, Any], processes: int = 1) -> Machine:
    """This machine for so many processes: speed of one from its own steps, and the connection as it was measured."""
    one = next(r for r in result["layouts"] if r["processes"] == 1)
    links = [r["link"] for r in result["layouts"] if r["processes"] == 2]
    work = flops(shape_of(result), step_of(result, Layout()), Layout())
    gather, summing, latency = (statistics.median(link[k] for link in links) for k in ("gather", "sum", "latency"))
    share = min(1.0, result["cores"] / processes)
    return Machine(
        "here", share * work / one["seconds"], gather, gather, latency, processes, summing=summing, overlaps=False
    )


def _sent(result: Mapping[str, Any]) -> Iterator[str]:
    step = result["step"]
    yield "## What a step sends, counted"
    yield ""
    yield (
        f"Every collective of a real step of a 135M backbone (float32, {step['batch_size']} rows of {step['tokens']} "
        f"tokens, {step['virtual_tokens']} virtual tokens), as torch's dispatcher saw it. The counts that the model "
        "below is made of are these to the byte (a test)."
    )
    yield ""
    yield "| layout | collectives of a step | MB that a process sends |"
    yield "|---|---|---|"
    for run in result["layouts"]:
        layout = parse_layout(run["layout"], run["processes"])
        words = ", ".join(f"{c['calls']} {c['kind']} of {c['size'] / 1e6:.3g} MB" for c in run["collectives"]) or "none"
        sent = sum(c.sent for c in predicted(result, layout)) / 1e6
        yield f"| {_title(run)} | {words} | {sent:.3g} |"


def _title(run: Mapping[str, Any]) -> str:
    return str(run["layout"]) if run["processes"] > 1 else "one process"


def _measured(result: Mapping[str, Any]) -> Iterator[str]:
    machine, shape = machine_of(result), shape_of(result)
    yield "## Measured and predicted"
    yield ""
    yield (
        f"{result['cores']} cores of a {result['machine']['cpu']}, one a process, the single process on one too; "
        f"medians of {result['step']['rounds']} rounds in turn, {result['date']}. Predicted: the counts, with the "
        f"speed of the single process ({machine.flops / 1e9:.0f} GFLOP/s) and the connection as measured beside "
        f"the steps (weights {machine.inside / 1e9:.2f} GB/s, activations {machine.summing / 1e9:.2f} GB/s, "
        f"{machine.latency * 1e6:.0f} µs a call)."
    )
    yield ""
    yield "| layout | seconds a step | of one process's speed | predicted | MB of memory |"
    yield "|---|---|---|---|---|"
    one = next(r["seconds"] for r in result["layouts"] if r["processes"] == 1)
    for run in result["layouts"]:
        layout = parse_layout(run["layout"], run["processes"])
        said = seconds(shape, step_of(result, layout), layout, machine_of(result, run["processes"]))
        low, high = run["spread"]
        yield (
            f"| {_title(run)} | {run['seconds']:.2f} [{low:.2f}, {high:.2f}] "
            f"| {one / run['seconds']:.2f} | {said:.2f} | {run['peak_mb']} |"
        )
    yield ""
    yield (
        "Data parallel steps take what the counts say. Spread layouts take longer here: torch copies every gathered "
        "layer twice and waits for the slower process at every collective, on the cores that compute; and four "
        "processes share two cores. So on one machine of processors spreading is for trying it out."
    )


def _memory() -> Iterator[str]:
    yield "## Which layout"
    yield ""
    yield (
        "Data parallel while the backbone fits, as it sends next to nothing. Else `fsdp` over the cards of one "
        "machine, `ddp` between machines; `tp` where a step has too few tokens to hide the gathering (few rows, or "
        "latency matters). Bytes of one card, bfloat16, a pass of 16,384 tokens with `train.recompute`, in GB:"
    )
    yield ""
    layouts = (Layout(), Layout(fsdp=8), Layout(tp=8), Layout(fsdp=4, tp=2), Layout(fsdp=8, tp=8))
    yield f"| backbone | {' | '.join('one card' if x == Layout() else f'`{x}`' for x in layouts)} |"
    yield f"|---|{'---|' * len(layouts)}"
    step = Step(BUDGET, 64, VIRTUAL * 8192, recompute=True)
    for shape in MODELS:
        yield f"| {shape.name} | {' | '.join(f'{memory(shape, step, x) / 1e9:.0f}' for x in layouts)} |"


def _large(result: Mapping[str, Any]) -> Iterator[str]:
    shape, step, machine = result["shape"], result["step"], result["machine"]
    yield "## A 7B backbone in a small machine"
    yield ""
    yield (
        f"{shape['num_hidden_layers']} layers of {shape['hidden_size']:,} with random weights, "
        f"{result['stored_gb']:.1f} GB on disk in bfloat16, trained for {step['steps']} steps of {step['rows']} rows "
        f"with {step['virtual_tokens']} virtual tokens by `foreword train` on {machine['threads']} threads of a "
        f"{machine['cpu']} with {result['memory_gb']:.0f} GB, {result['date']} (`benchmarks/large.py`). Peaks of the "
        "whole command: all that is resident, and without pages of the weights' files, which the system takes back."
    )
    yield ""
    yield "| weights | resident, GB | own, GB | seconds a step | seconds in all | loss, first and last step |"
    yield "|---|---|---|---|---|---|"
    for way in result["ways"]:
        losses = f"{way['losses'][0]:.2f}, {way['losses'][-1]:.2f}"
        yield (
            f"| {way['way']} | {way['resident_gb']:.1f} | {way['own_gb']:.1f} | {way['step_seconds']:.1f} | "
            f"{way['seconds']:.0f} | {losses} |"
        )


def _grown() -> Iterator[str]:
    yield f"## One to {GPUS[-1]:,} GPUs"
    yield ""
    yield (
        f"Seconds a step of {ROWS:,} rows of {TOKENS} tokens, computed, not run: {H100.flops / 1e12:.0f} TFLOP/s a "
        f"card (measured on one H100), {H100.inside / 1e9:.0f} GB/s inside a machine of {H100.per_machine} cards and "
        f"{H100.across / 1e9:.0f} GB/s between machines a card, {H100.latency * 1e6:.0f} µs a collective and doubling "
        "(assumed). The fastest layout and size of a pass that fit 72 GB, and what is left of the cards' speed."
    )
    yield ""
    yield f"| backbone | {' | '.join(f'{n:,}' for n in GPUS)} |"
    yield f"|---|{'---|' * len(GPUS)}"
    for shape in MODELS:
        yield f"| {shape.name} | {' | '.join(_cells(shape))} |"
    yield ""
    yield (
        "A data set of fifty rows has no use for this: a step has eight rows, and more than eight readers would idle. "
        "There processes are for searches, whose trainings know nothing of each other."
    )


def _cells(shape: Shape) -> Sequence[str]:
    row = Step(TOKENS, TARGETS, VIRTUAL * shape.hidden)
    ideal = ROWS * flops(shape, row, Layout()) / H100.flops
    cells = []
    for n in GPUS:
        found = best(shape, row, ROWS, n, H100, BUDGET)
        cells.append(f"{found[0]:.3g} s, `{found[1]}`, {ideal / (found[0] * n):.0%}" if found else "does not fit")
    return cells


def main() -> Path:
    """Writes the page."""
    found, large = newest(FOLDER, "scale"), newest(FOLDER, "large")
    assert found and large, "run benchmarks/scale.py and benchmarks/large.py first"
    PAGE.write_text(page(found[0], large[0]))
    return PAGE


if __name__ == "__main__":
    main()
