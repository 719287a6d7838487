"""What ``foreword tune`` leaves: an ensemble's folder (or one adapter), its card, and how it was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foreword.artifact.atomic import write_atomic
from foreword.artifact.ensemble import member_name, write_index
from foreword.artifact.folder import write_adapter
from foreword.artifact.peft_types import peft_config, placed_config
from foreword.artifact.sidecar import SIDECAR, Sidecar
from foreword.evaluation.evaluate import Outcome, label_counts, run_plain, run_rows, with_baselines
from foreword.evaluation.intervals import for_new_rows
from foreword.evaluation.metrics import token_loss
from foreword.evaluation.together import averaged
from foreword.jobs.candidates import Workshop
from foreword.jobs.derive import backbone_facts
from foreword.jobs.prepare import instruction
from foreword.jobs.report import Scored, write_report
from foreword.prompts.methods.base import Method
from foreword.records import Example
from foreword.report.card import ensemble_card, model_card
from foreword.report.facts import Spread
from foreword.training.progress import counting
from foreword.tuning.space import Candidate
from foreword.versions import library_versions

TUNED = "tune.json"


@dataclass(frozen=True)
class Made:
    """A member: the candidate it is of, its seed and classes' biases, what was trained, and what the training took."""

    candidate: Candidate
    seed: int
    biases: tuple[float, ...]
    kept: Method
    figures: dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """Out-of-fold outcomes of the chosen together and of the first alone, for the rows of ``order``."""

    together: Outcome
    single: Outcome
    order: Sequence[int]
    folds: int
    protocol: str


def write_tuned(
    workshop: Workshop, out: Path, members: Sequence[Made], expected: Expected, trials: Sequence[dict[str, Any]]
) -> None:
    """Scores the members on the held-out rows, if there are some, and writes everything; the index comes last.

    Args:
        workshop: backbone and rows.
        out: the run folder.
        members: of the ensemble, the best by itself first; one is written as a plain adapter.
        expected: how they did in cross-validation.
        trials: of the whole search.
    """
    together, single = _expected(workshop, members[0].candidate, expected)
    scored, held_out = _held_out(workshop, members)
    several = len(members) > 1
    for number, made in enumerate(members):
        own = single if number == 0 else {}
        scores = own if several else held_out or (single if workshop.splits.task.classifies else {})
        _write_member(workshop, out / member_name(number) if several else out, made, scores)
    found = {"members": [str(m.candidate) for m in members], "expected": together, "expected_single": single}
    if held_out:
        found["scores"] = held_out
    write_atomic(out / TUNED, (json.dumps(found | {"trials": list(trials)}, indent=2) + "\n").encode())
    if several:
        _write_ensemble(workshop, out, members, held_out or together)
    _report(workshop, out, members[0], scored or _out_of_fold(workshop, members[0].candidate, expected), trials)


def _expected(workshop: Workshop, candidate: Candidate, expected: Expected) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of the out-of-fold outcomes, beside the baselines on the same rows; of free text the loss alone."""
    outcomes = (expected.together, expected.single)
    if not workshop.splits.task.classifies:
        loss = token_loss(expected.single.logprobs, expected.single.target_tokens)
        found = for_new_rows({"n": len(expected.order), **loss, "protocol": expected.protocol}, expected.folds)
        return found, found
    plain = _plain(workshop, candidate, [workshop.ready(candidate).examples[i] for i in expected.order])
    together, single = (for_new_rows(_beside(workshop, o, plain, expected.protocol), expected.folds) for o in outcomes)
    return together, single


def _out_of_fold(workshop: Workshop, candidate: Candidate, expected: Expected) -> Scored | None:
    """The training rows with what those said of them who were not trained on them; None for free text."""
    if expected.together.probabilities is None:
        return None
    ready = workshop.ready(candidate)
    rows = workshop.splits.train.pick(expected.order).rows
    examples = [ready.examples[i] for i in expected.order]
    return Scored(examples, rows, expected.together, ready.encoder.label_ids, trained_on=True)


def _report(
    workshop: Workshop, out: Path, first: Made, scored: Scored | None, trials: Sequence[dict[str, Any]]
) -> None:
    """``report.html``: of all members together, with the virtual tokens of the first and the whole search."""
    start = workshop.method(first.candidate, first.seed).soft_prompt()
    shown = [{**t, "score": t["loss"], "kept": False} for t in trials]
    with counting(workshop.console, "report", None):
        write_report(
            out, workshop.backbone, first.kept.soft_prompt(), workshop.layout(first.candidate).score, start,
            scored, Spread(shown, "loss on rows left out", lower=True),
        )  # fmt: skip


def _held_out(workshop: Workshop, members: Sequence[Made]) -> tuple[Scored | None, dict[str, Any]]:
    """What all together say of the held-out rows, and its scores; nothing without such rows."""
    splits = workshop.splits
    if splits.held_out is None:
        return None, {}
    outcomes = []
    with counting(workshop.console, "scoring", len(splits.held_out) * len(members)) as progress:
        for made in members:
            ready, layout = workshop.ready(made.candidate), workshop.layout(made.candidate).score
            rows = ready.encoder.examples(splits.held_out)
            prompt = made.kept.soft_prompt()
            outcome = run_rows(workshop.backbone, prompt, rows, ready.encoder.label_ids, layout, progress)
            outcomes.append(outcome.rebalanced(made.biases))
    candidate = members[0].candidate
    encoder = workshop.ready(candidate).encoder
    rows, outcome = encoder.examples(splits.held_out), averaged(outcomes)
    plain = _plain(workshop, candidate, rows)
    scored = Scored(rows, splits.held_out.rows, outcome, encoder.label_ids)
    return scored, _beside(workshop, outcome, plain, splits.protocol)


def _beside(workshop: Workshop, outcome: Outcome, plain: Outcome, protocol: str) -> dict[str, Any]:
    return with_baselines(outcome, plain, _counts(workshop), workshop.splits.task.classes, protocol)


def _plain(workshop: Workshop, candidate: Candidate, rows: Sequence[Example]) -> Outcome:
    ready, layout = workshop.ready(candidate), workshop.layout(candidate).score
    with counting(workshop.console, "baseline", len(rows)) as progress:
        return run_plain(workshop.backbone, rows, ready.encoder.label_ids, layout, progress)


def _counts(workshop: Workshop) -> list[int]:
    """Training rows of each class."""
    ready = next(iter(workshop.groups))
    return label_counts(ready.examples, workshop.splits.task.classes)


def _write_member(workshop: Workshop, out: Path, made: Made, scores: dict[str, Any]) -> None:
    """A valid adapter folder by itself."""
    backbone, kept, ready = workshop.backbone, made.kept, workshop.ready(made.candidate)
    task = replace(ready.encoder.task, biases=made.biases)
    text = (ready.prompt.init_text or instruction(task)) if made.candidate.init == "text" else None
    adapter = peft_config(
        kept.peft_type, kept.stored(), model_config=backbone.config, base=backbone.name, revision=backbone.revision,
        prompt=ready.prompt, init_text=text, geometry=backbone.geometry if kept.kind == "prefix" else None,
    )  # fmt: skip
    adapter = adapter if ready.encoder.at_front else placed_config(adapter)
    facts = {
        **_shared_facts(workshop), **made.candidate.settings, "init_text": text, "seed": made.seed,
        "trainable": sum(p.numel() for p in kept.parameters() if p.requires_grad), **made.figures,
    }  # fmt: skip
    sidecar = Sidecar(task, backbone_facts(backbone), scores, facts, library_versions())
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "README.md", model_card(adapter, sidecar).encode())
    write_adapter(out, kept.stored(), adapter, sidecar)


def _write_ensemble(workshop: Workshop, out: Path, members: Sequence[Made], scores: dict[str, Any]) -> None:
    """Sidecar, card and index of all members together."""
    names = [str(m.candidate) for m in members]
    facts = {**_shared_facts(workshop), "members": names}
    task = workshop.ready(members[0].candidate).encoder.task
    sidecar = Sidecar(task, backbone_facts(workshop.backbone), scores, facts, library_versions())
    write_atomic(out / "README.md", ensemble_card(names, sidecar).encode())
    write_atomic(out / SIDECAR, sidecar.to_json().encode())
    write_index(out, len(members))


def _shared_facts(workshop: Workshop) -> dict[str, Any]:
    """What all members have in common, JSON-safe."""
    recipe, backbone, splits = workshop.recipe, workshop.backbone, workshop.splits
    return {
        "rows": len(splits.train), "label_counts": _counts(workshop), "data_sha256": splits.data_hash,
        "data_seed": recipe.data.seed, "tuned": True, "epochs": workshop.epochs(len(splits.train)),
        "device": str(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."), "quantize": backbone.rounding,
    }  # fmt: skip
