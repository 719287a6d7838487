"""``report.html`` of a run: what the model is asked for it, and what lies in the run's folder already."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foreword.artifact.atomic import write_atomic
from foreword.artifact.sidecar import SIDECAR, Sidecar, read_sidecar
from foreword.backbone.choose import Layout
from foreword.backbone.load import Backbone
from foreword.data.template import parse
from foreword.errors import ForewordError
from foreword.evaluation.evaluate import Outcome
from foreword.evaluation.metrics import reliability
from foreword.jobs.virtual import describe, evenly, leave_one_out
from foreword.prompts.soft import SoftPrompt
from foreword.recipe import RECIPE, as_dict, load_recipe, to_yaml
from foreword.records import Example, Row, Task
from foreword.report.facts import Bin, Curves, Point, ReportFacts, Sample, Spread, WrongRow
from foreword.report.page import REPORT, page
from foreword.training.progress import METRICS

MOST_WRONG = 12
MOST_SAMPLES = 8


@dataclass(frozen=True)
class Scored:
    """The rows behind a run's scores, all in one order.

    Args:
        examples: as they were scored.
        rows: the same as the user wrote them.
        outcome: what came out.
        label_ids: label words of each class; empty for free text.
        trained_on: whether the kept soft prompt was trained on them (cross-validation).
    """

    examples: Sequence[Example]
    rows: Sequence[Row]
    outcome: Outcome
    label_ids: Sequence[Sequence[int]]
    trained_on: bool = False


def write_report(
    folder: Path,
    backbone: Backbone,
    prompt: SoftPrompt,
    layout: Layout,
    start: SoftPrompt | None = None,
    scored: Scored | None = None,
    spread: Spread | None = None,
    kept: int = 0,
) -> Path:
    """Writes ``report.html`` into a run's folder and returns its path.

    Scores, recipe and curves are read from the folder, which must hold its sidecar. The rows of ``scored`` are not
    scored again, but some are read without one virtual token after the other (``virtual.py``).

    Args:
        folder: of the run, with its adapter written.
        backbone: the model.
        prompt: the soft prompt in the folder.
        layout: how rows share a forward pass when scoring.
        start: the soft prompt before the first step; None: unknown.
        scored: the rows behind the scores; None: the run was not scored.
        spread: trainings to show side by side (population, tuning).
        kept: the member of the population that was kept.
    """
    sidecar = read_sidecar(folder)
    if sidecar is None:
        raise ForewordError(f"no {SIDECAR} to report on", str(folder), "give the folder of a run of foreword train")
    prompt = prompt.to(backbone.device)
    recipe, changed = _recipe(folder)
    facts = ReportFacts(
        folder.resolve().name, sidecar, prompt.kind, describe(backbone, prompt, start), curves(folder, kept),
        spread=spread or Spread(), recipe=recipe, changed=changed,
        **(_judged(sidecar, backbone, prompt, layout, scored) if scored else {}),
    )  # fmt: skip
    write_atomic(folder / REPORT, page(facts).encode("utf-8", "replace"))
    return folder / REPORT


def _judged(sidecar: Sidecar, backbone: Backbone, prompt: SoftPrompt, layout: Layout, scored: Scored) -> dict[str, Any]:
    """The facts that need scored rows."""
    found: dict[str, Any] = {}
    if prompt.tokens:
        found["left_out"] = leave_one_out(
            backbone, prompt, scored.examples, scored.label_ids, layout, scored.trained_on
        )
    if scored.outcome.probabilities is None:
        return {**found, "samples": samples(sidecar.task, scored)}
    wrong = wrong_rows(sidecar.task, scored)
    return {**found, "bins": bins(scored.outcome), "wrong": wrong[:MOST_WRONG], "wrong_count": len(wrong)}


def bins(outcome: Outcome) -> list[Bin]:
    """The reliability diagram's bins that have rows."""
    assert outcome.probabilities is not None
    table = reliability(np.asarray(outcome.truth, dtype=np.int64), outcome.probabilities)
    return [Bin(int(n), float(p / n), float(right / n)) for n, p, right in zip(*table, strict=True) if n]


def wrong_rows(task: Task, scored: Scored) -> list[WrongRow]:
    """The rows with a wrong class, those it was surest of first."""
    probabilities = scored.outcome.probabilities
    assert probabilities is not None
    said = probabilities.argmax(1).tolist()
    found = [
        WrongRow(
            e.number, text_of(task, row), task.classes[y], task.classes[s], float(probabilities[i, y]),
            float(probabilities[i, s]),
        )
        for i, (e, row, y, s) in enumerate(zip(scored.examples, scored.rows, scored.outcome.truth, said, strict=True))
        if y != s
    ]  # fmt: skip
    return sorted(found, key=lambda r: -r.p_said)


def samples(task: Task, scored: Scored) -> list[Sample]:
    """Some inputs of a free-text task with what was written for them when it was scored."""
    outcome = scored.outcome
    found = []
    for k in evenly(len(outcome.texts), MOST_SAMPLES):
        i = outcome.firsts[k]
        example, loss = scored.examples[i], -outcome.logprobs[i] / outcome.target_tokens[i]
        targets = " | ".join(outcome.references[k])
        found.append(Sample(example.number, text_of(task, scored.rows[i]), targets, outcome.texts[k], loss))
    return found


def text_of(task: Task, row: Row) -> str:
    """The columns of a row that the template reads."""
    columns = [f.column for f in parse(task.template).fields]
    if len(columns) == 1:
        return str(row[columns[0]])
    return " | ".join(f"{c}: {row[c]}" for c in columns)


def curves(folder: Path, kept: int = 0) -> Curves:
    """Losses and validation scores by step, member by member, from ``metrics.jsonl``; empty without that file."""
    file = folder / METRICS
    events = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    steps = [e for e in events if e["event"] == "step"]
    if not steps:
        return Curves(kept=kept)
    count = 1 + max(m for e in steps for m in e.get("members", [0]))
    loss: list[list[Point]] = [[] for _ in range(count)]
    for e in steps:
        for member, value in zip(e.get("members", [0]), e.get("losses", [e["loss"]]), strict=True):
            loss[member].append((e["step"], value))
    checks = [e for e in events if e["event"] == "validation"]
    return Curves(loss, _validation(checks, count), kept, max(1, steps[0]["steps"] // steps[0]["epochs"]))


def _validation(events: Sequence[Mapping[str, Any]], count: int) -> dict[str, list[list[Point]]]:
    names = [k for k, v in (events[0] if events else {}).items() if isinstance(v, float)]
    found: dict[str, list[list[Point]]] = {name: [[] for _ in range(count)] for name in names}
    for e in events:
        for name in names:
            found[name][e.get("member", 0)].append((e["step"], e[name]))
    return found


def _recipe(folder: Path) -> tuple[str, dict[str, Any]]:
    """The recipe without its comments, and the keys that differ from their defaults."""
    file = folder / RECIPE
    if not file.is_file():
        return "", {}
    recipe = load_recipe(file)
    default = as_dict(type(recipe)())
    stated = as_dict(recipe)
    changed = {f"{s}.{k}": v for s, keys in stated.items() for k, v in keys.items() if v != default[s][k]}
    return to_yaml(recipe, comments=False), changed
