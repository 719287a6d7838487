"""The report's parts about scored rows: baselines, classes, calibration, errors, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foreword.report.card import rows_scored
from foreword.report.charts import Marks, reliability_chart, row_chart
from foreword.report.facts import ReportFacts
from foreword.report.markup import Child, Markup, el, joined, section, shortened, table

NAMES = {
    "start": "before the first step", "full_text": "full text", "zero_shot": "zero-shot", "majority": "majority class",
}  # fmt: skip
METRICS = {
    "accuracy": "accuracy", "exact_match": "exact match", "macro_f1": "macro-F1", "loss": "loss",
    "bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L", "perplexity": "perplexity",
    "calibration_error": "calibration error",
}  # fmt: skip
OF_100 = {"bleu", "chrf"}
"""Metrics that are given of 100; those of 1 have more digits."""
TEXT = 200
"""Most characters of a row's text that are shown."""
FEW = 5
"""Up to so many classes have their names over the columns of the confusion matrix, more have numbers."""
HOT = 60
"""Percent of colour from which a cell's text is set in the ground's colour."""


def main_metric(scores: Mapping[str, Any]) -> str:
    """What the run is judged by."""
    return "accuracy" if "accuracy" in scores else "exact_match"


def named_scores(scores: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The soft prompt and every baseline, by name."""
    others = [(NAMES.get(key, key.replace("_", " ")), found) for key, found in scores.get("baselines", {}).items()]
    return [("this soft prompt", scores), *others]


def headline(scores: Mapping[str, Any]) -> Markup:
    """The score with its interval, large, and beside its baselines on one scale."""
    main = main_metric(scores)
    low, high = scores["intervals"][main]
    marks = [
        Marks(name, [found[main]], found.get("intervals", {}).get(main, ()), "strong" if found is scores else "plain")
        for name, found in named_scores(scores)
        if main in found
    ]
    figure = el(
        "div", el("p", f"{scores[main]:.3f}", class_="figure"),
        el("p", f"{METRICS[main]}, 95 % interval {low:.3f} to {high:.3f}"),
        el("p", f"{rows_scored(scores)}: {scores['protocol']}.", class_="note"),
    )  # fmt: skip
    return el("div", figure, el("div", row_chart(marks, METRICS[main], 0.0, 1.0)), class_="hero")


def scores_table(scores: Mapping[str, Any]) -> Markup:
    """Every score with its interval, the soft prompt's first."""
    metrics = [k for k in scores if isinstance(scores[k], float)]
    metrics.sort(key=lambda k: [*METRICS, k].index(k))
    rows = [[name, *(_with_interval(found, m) for m in metrics)] for name, found in named_scores(scores)]
    head = ["", *(METRICS.get(m, m.replace("_", " ")) for m in metrics)]
    note = (
        "In brackets: 95 % intervals by the bootstrap over rows; of shares and F1 also as far as their posterior "
        "reaches. Loss: nats a target token, its end token included."
    )
    return section("Scores beside their baselines", table(head, rows, "first stack"), note=note)


def _with_interval(scores: Mapping[str, Any], key: str) -> Child:
    value = scores.get(key)
    if not isinstance(value, (int, float)):
        return ""
    interval = scores.get("intervals", {}).get(key)
    digits = 0 if abs(value) >= 100 else 1 if key in OF_100 else 3
    low_high = ", ".join(_short(bound, digits) for bound in interval or ())
    bounds = f" [{low_high}]" if interval else ""
    return el("span", _short(value, digits), el("small", bounds) if bounds else None)


def _short(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.2g}"


def classes(facts: ReportFacts) -> Markup | None:
    """Confusion matrix, and precision, recall and F1 of each class."""
    scores = facts.sidecar.scores
    if "confusion" not in scores:
        return None
    names, counts = scores["confusion"]["classes"], scores["confusion"]["counts"]
    return section(
        "Classes",
        el("h3", "Confusion: rows are the true class, columns what it said"),
        _confusion(names, counts),
        el("h3", "Precision, recall and F1"),
        _per_class(scores["per_class"]),
        note="Colour: share of the true class's rows. In brackets: 95 % intervals.",
    )


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    many = len(names) > FEW
    head = ["", *(str(i + 1) if many else shortened(n, 40) for i, n in enumerate(names))]
    rows = []
    for i, row in enumerate(counts):
        name = f"{i + 1} {shortened(names[i], 40)}" if many else shortened(names[i], 40)
        cells = [_heat(n, n / max(sum(row), 1), i == j) for j, n in enumerate(row)]
        rows.append(el("tr", el("th", name, scope="row"), *cells))
    titles = el("tr", *(el("th", h, scope="col") for h in head))
    return el("div", el("table", el("thead", titles), el("tbody", *rows), class_="heat"), class_="scroll")


def _heat(count: int, share: float, right: bool) -> Markup:
    percent = round(85 * share)
    kind = " ".join(filter(None, ["" if right else "wrong", "hot" if percent >= HOT else ""]))
    return el("td", count, style=f"--share: {percent}%", class_=kind or None)


def _per_class(per_class: Mapping[str, Any]) -> Markup:
    rows = [
        [shortened(name, 60), found["n"], *(_with_interval(found, m) for m in ("precision", "recall", "f1"))]
        for name, found in per_class.items()
    ]
    return table(["class", "rows", "precision", "recall", "F1"], rows, "stack")


def calibration(facts: ReportFacts) -> Markup | None:
    """The reliability diagram with the expected calibration error."""
    if not facts.bins:
        return None
    scores = facts.sidecar.scores
    low, high = scores["intervals"]["calibration_error"]
    error = scores["calibration_error"]
    said = [
        el("p", f"{error:.3f}", class_="figure"),
        el("p", f"expected calibration error, 95 % interval {low:.3f} to {high:.3f}"),
        el("p", "The mean distance of the dots from the diagonal, weighted by rows: 0 is perfect. A dot is a bin of "
           "probabilities (15 of equal width, empty ones left out), its area the rows in it.", class_="note"),
        el("p", "Below the diagonal the soft prompt was surer than it was right; above, less sure.", class_="note"),
    ]  # fmt: skip
    chart = reliability_chart(facts.bins)
    return section("Calibration", el("div", el("div", chart), el("div", *said), class_="pair"))


def errors(facts: ReportFacts) -> Markup | None:
    """The rows it was surest about and wrong."""
    if not facts.sidecar.task.classifies or not facts.sidecar.scores:
        return None
    if not facts.wrong:
        return section("Worst errors", el("p", "No scored row got a wrong class."))
    rows = [
        [r.number, shortened(r.text, TEXT), _with_probability(r.truth, r.p_truth), _with_probability(r.said, r.p_said)]
        for r in facts.wrong
    ]
    head = ["row", "text", "true class", "said"]
    shown = "All" if len(rows) == facts.wrong_count else f"The {len(rows)}"
    note = f"{shown} of {facts.wrong_count} wrong rows, those with the highest probability of a wrong class first. "
    note += "Beside each class its probability."
    return section("Worst errors", table(head, rows, "stack", wide=(1,)), note=note)


def _with_probability(name: str, probability: float) -> Markup:
    return joined([shortened(name, 60), " ", el("small", f"{probability:.3f}")])


def samples(facts: ReportFacts) -> Markup | None:
    """What it wrote, beside what was wanted."""
    if not facts.samples:
        return None
    rows = [
        [s.number, shortened(s.text, TEXT), shortened(s.target, TEXT), shortened(s.wrote, TEXT), f"{s.loss:.3f}"]
        for s in facts.samples
    ]
    inputs = facts.sidecar.scores.get("contexts", facts.sidecar.scores["n"])
    note = f"{len(rows)} of {inputs} scored inputs, evenly chosen; written greedily. "
    note += "Loss: of the (first) target, nats a token."
    head = ["row", "text", "target", "it wrote", "loss"]
    return section("Samples", table(head, rows, "stack", numbers=(4,), wide=(1, 2, 3)), note=note)
