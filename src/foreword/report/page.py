"""``report.html``: one page about a run that needs no network, no scripts and no other file."""

from __future__ import annotations

from foreword.report import scored, trained
from foreword.report.facts import ReportFacts
from foreword.report.markup import Markup, el, joined, section
from foreword.report.style import STYLE

REPORT = "report.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may do with the page: apply its own styles, and nothing else."""


def page(facts: ReportFacts) -> str:
    """The whole page.

    Args:
        facts: everything it tells; parts without facts are left out, or say why there are none.
    """
    head = el(
        "head",
        Markup('<meta charset="utf-8">'),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", f"{facts.name}: Foreword report"),
        el("style", Markup(STYLE)),
    )
    body = el("body", el("main", *_parts(facts)))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _parts(facts: ReportFacts) -> list[Markup | None]:
    scores = facts.sidecar.scores
    judged = [scored.scores_table(scores)] if scores else [_not_scored()]
    return [
        _header(facts),
        *judged,
        trained.curves(facts),
        scored.classes(facts),
        scored.calibration(facts),
        scored.errors(facts),
        scored.samples(facts),
        trained.virtual_tokens(facts),
        trained.spread(facts.spread),
        trained.settings(facts),
    ]


def _header(facts: ReportFacts) -> Markup:
    task, training = facts.sidecar.task, facts.sidecar.training
    what = f"{len(task.classes)} classes" if task.classifies else "free text"
    kind = "keys and values of every layer" if facts.kind == "prefix" else "rows at the embedding"
    stated = {
        "task": joined([f"{task.label_column} ({what}) from ", el("code", f"{task.template}{task.separator}…")]),
        "backbone": joined([el("code", facts.sidecar.backbone["name"]), ", frozen"]),
        "soft prompt": f"{len(facts.tokens)} virtual tokens ({kind}), {training.get('method')}",
    }
    if "members" in training:
        names = training["members"]
        stated["soft prompt"] = (
            f"ensemble of {len(names)}, label probabilities averaged; tokens below are of the first, {names[0]}"
        )
    pairs = [part for name, value in stated.items() for part in (el("dt", name), el("dd", value))]
    scores = facts.sidecar.scores
    return el(
        "header", el("h1", facts.name), el("dl", *pairs, class_="facts"), scored.headline(scores) if scores else None
    )


def _not_scored() -> Markup:
    return section(
        "Not scored",
        el(
            "p",
            "The run had no held-out rows, so there are no scores, classes, errors or samples here, and no effect of "
            "single virtual tokens. Give --eval-data, data.eval_fraction=0.2 or data.folds=5.",
        ),
    )
