"""Training steps and scoring against PEFT's guide loop: same rows, model, precision and machine.

    .venv/bin/python benchmarks/cpu.py [--data train.csv --text "Tweet text" --label Label]

The two alternate batch by batch in one process; figures are medians with their spread. Writes a
dated JSON into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft_guide import GuideLoop, batch_of, wrap

from foreword.backbone.choose import choose_layout
from foreword.backbone.load import Backbone, load_backbone
from foreword.backbone.virtual import VirtualTokens
from foreword.config import DataConfig, ModelConfig, PromptConfig, TrainConfig
from foreword.data.encode import common_opening
from foreword.evaluation.scoring import classify
from foreword.jobs.data import read_splits
from foreword.jobs.prepare import initial_rows, make_encoder
from foreword.records import Segment
from foreword.training.loop import _step, make_plan, start

BATCH = 8


def main() -> None:
    """Runs both sizes of soft prompt and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="bundled:complaints")
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--virtual-tokens", type=int, nargs="+", default=[8, 100])
    parser.add_argument("--rounds", type=int, default=3, help="passes over the rows")
    args = parser.parse_args()
    backbone = load_backbone(ModelConfig(args.model))
    results = [measure(backbone, args, p) for p in args.virtual_tokens]
    machine = {
        "date": datetime.date.today().isoformat(), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "device": str(backbone.device), "dtype": str(backbone.dtype),
        "versions": {n: version(n) for n in ("foreword", "torch", "transformers", "peft")},
    }  # fmt: skip
    out = Path(__file__).parent / "results" / f"{machine['date']}-cpu.json"
    out.parent.mkdir(exist_ok=True)
    content = {**machine, "model": args.model, "rows": Path(args.data).name, "results": results}
    out.write_text(json.dumps(content, indent=2) + "\n")
    for r in results:
        print(json.dumps(r))


def measure(backbone: Backbone, args: argparse.Namespace, virtual_tokens: int) -> dict[str, Any]:
    """Both loops over the same batches, in turn."""
    template = f"Tweet text : {{{args.text}}} Label :"
    splits = read_splits(DataConfig(path=args.data, template=template, label=args.label))
    encoder = make_encoder(splits.task, backbone, virtual_tokens)
    examples = encoder.examples(splits.train)
    config = TrainConfig(epochs=args.rounds)
    rows = initial_rows(PromptConfig(virtual_tokens), splits.task, encoder, backbone, 0)
    layout = choose_layout(backbone, rows, [Segment(e.context, encoder.label_ids) for e in examples])
    opening = common_opening([e.context for e in examples])
    plan = make_plan(len(examples), config)
    state = start(rows, config, plan, backbone.device)
    peft = wrap(backbone.model, virtual_tokens)
    guide = GuideLoop(peft, plan.steps)
    with torch.no_grad():
        peft.prompt_encoder["default"].embedding.weight.copy_(rows)
    batches = [examples[i : i + BATCH] for i in range(0, len(examples) - BATCH + 1, BATCH)]
    theirs, ours, score_theirs, score_ours = [], [], [], []
    for round_ in range(args.rounds + 1):  # the first round warms up
        for batch in batches:
            tensors = batch_of(batch, backbone.end_id)
            segments = [Segment(e.context[len(opening) :], (e.target,)) for e in batch]
            t = seconds(lambda: guide.step(tensors))  # noqa: B023 (called at once)
            with VirtualTokens(backbone.embedding, state.rows) as virtual:
                ids = [*virtual.ids, *opening]
                o = seconds(lambda: _step(backbone, ids, segments, state, config, layout.train))  # noqa: B023
            if round_:
                theirs.append(t)
                ours.append(o)
        tensors_all = [batch_of(examples[i : i + BATCH], backbone.end_id) for i in range(0, len(examples), BATCH)]
        contexts = [e.context for e in examples]
        t = seconds(lambda: guide.evaluate(tensors_all))  # noqa: B023
        table = state.rows.detach()
        o = seconds(lambda: classify(backbone, table, contexts, encoder.label_ids, layout.score))  # noqa: B023
        if round_:
            score_theirs.append(t)
            score_ours.append(o)
    return {
        "virtual_tokens": virtual_tokens,
        "layout": layout.train,
        "train_step": ratio(theirs, ours),
        "score_all_rows": ratio(score_theirs, score_ours),
    }


def ratio(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    """Medians in seconds with their spread, and PEFT's over ours."""
    return {
        "peft_s": spread(theirs),
        "foreword_s": spread(ours),
        "ratio": round(statistics.median(theirs) / statistics.median(ours), 2),
        "runs": len(ours),
    }


def spread(values: list[float]) -> list[float]:
    """Minimum, median, maximum."""
    return [round(f(values), 3) for f in (min, statistics.median, max)]


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
