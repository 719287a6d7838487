"""The report's parts about training: curves, virtual tokens, members side by side, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from foreword.report.charts import Line, Marks, bar_chart, legend, line_chart, row_chart, scatter_chart, smoothed
from foreword.report.facts import Curves, LeftOut, Near, Point, ReportFacts, Spread, Trial, VirtualToken
from foreword.report.markup import Child, Markup, el, joined, section, shortened, table

MEASURES = {"loss": "validation loss (nats a target token)", "macro_f1": "validation macro-F1"}
MOST_TOKENS, FURTHEST = 40, 16
"""Virtual tokens that are all shown at once; of more so many."""
FACETS = {"init": "initialiser", "method": "method", "virtual_tokens": "virtual tokens", "rung": "rung"}


def curves(facts: ReportFacts) -> Markup | None:
    """Training loss, and every validation score, by step."""
    found = facts.curves
    if not any(found.loss):
        return None
    charts = [el("div", line_chart(_loss_lines(found), "step", "training loss (nats a target token)"), _keys(found))]
    for name, members in found.validation.items():
        lines = [Line(m, "strong" if k == found.kept else "thin") for k, m in enumerate(members) if m]
        if lines:
            title = MEASURES.get(name, f"validation {name.replace('_', '-')}")
            charts.append(el("div", line_chart(lines, "step", title)))
    note = "" if found.validation else "No rows were set apart for validation (data.validation_fraction)."
    return section("Training", el("div", *charts, class_="pair"), note=note)


def _loss_lines(found: Curves) -> list[Line]:
    """Means over an epoch; of a run of one soft prompt each step too."""
    means = [smoothed(m, found.steps_per_epoch) for m in found.loss]
    if len(found.loss) == 1:
        return [Line(found.loss[0], "faint"), Line(means[0])]
    return [Line(m, "strong" if k == found.kept else "thin") for k, m in enumerate(means) if m]


def _keys(found: Curves) -> Markup:
    strong = f"mean of the last {found.steps_per_epoch} steps (an epoch)"
    keys = [("faint", "each step"), ("strong", strong)]
    if len(found.loss) > 1:
        others = len(found.loss) - 1
        keys = [("thin", f"{others} other member{'s' * (others > 1)}"), ("strong", f"the member kept, {strong}")]
    return el("ul", *(el("li", el("i", class_=f"key {kind}"), name) for kind, name in keys), class_="legend")


def virtual_tokens(facts: ReportFacts) -> Markup:
    """What lies nearest to each virtual token, how far it went, and what it is worth."""
    left = facts.left_out
    rows_kind = facts.kind == "rows"
    head = ["token", *(["nearest by cosine", "nearest by L2 distance"] if rows_kind else []), "moved"]
    head += ["loss change"] if left else []
    head += ["accuracy change"] if left and left.accuracy_change else []
    rows = [_token_row(i, token, rows_kind, left) for i, token in enumerate(facts.tokens)]
    numbers, wide = range(3 if rows_kind else 1, len(head)), (1, 2) if rows_kind else ()
    few = _furthest(facts.tokens)
    body = [table(head, [rows[i] for i in few], "stack", numbers, wide)]
    if len(few) < len(rows):
        body.append(el("details", el("summary", f"All {len(rows)}"), table(head, rows, "stack", numbers, wide)))
    return section("Virtual tokens", *_worth(left, facts), *body, note=_token_note(facts))


def _furthest(tokens: Sequence[VirtualToken]) -> list[int]:
    """Which virtual tokens are shown at once: all, or of many those that moved furthest, in their order."""
    if len(tokens) <= MOST_TOKENS:
        return list(range(len(tokens)))
    ranked = sorted(range(len(tokens)), key=lambda i: -(tokens[i].moved or 0.0))
    return sorted(ranked[:FURTHEST])


def _token_note(facts: ReportFacts) -> str:
    moved = "Moved: L2 distance from where training began, in brackets as a share of the norm there."
    if len(facts.tokens) > MOST_TOKENS:
        moved += f" The {FURTHEST} that moved furthest:"
    if facts.kind == "prefix":
        return f"Keys and values have no nearest words in the vocabulary. {moved}"
    return f"In each row the three vocabulary tokens whose embeddings lie nearest; · is a space. {moved}"


def _worth(left: LeftOut | None, facts: ReportFacts) -> list[Markup]:
    if left is None:
        return []
    which = f"each of the {len(left.loss_change)}"
    if len(left.loss_change) < len(facts.tokens):
        which = f"{len(left.loss_change)} evenly chosen of the {len(facts.tokens)}"
    with_all = f"With all of them: loss {left.loss:.4f}"
    with_all += "" if left.accuracy is None else f", accuracy {left.accuracy:.3f}"
    chosen = f"all {left.rows}" if left.rows == left.scored else f"{left.rows} evenly chosen of {left.scored}"
    said = (
        f"Leave one out: {which} virtual tokens was dropped alone and {chosen} scored rows were read again. "
        f"{with_all}. A bar upwards: without the token the loss is higher, so it helps. "
        "Lines and brackets: 95 % bootstrap intervals over the rows read."
    )
    if left.trained_on:
        said += " The soft prompt was trained on these rows: the run was scored by cross-validation."
    if facts.kind == "prefix":
        said += " A dropped token's keys and values are gone from every layer; the others keep their places."
    bars = bar_chart(
        left.loss_change, left.loss_interval, "virtual token", "change of loss without it (nats a target token)"
    )
    return [el("div", el("div", bars), el("p", said, class_="note"), class_="pair")]


def _token_row(i: int, token: VirtualToken, rows_kind: bool, left: LeftOut | None) -> list[Child]:
    cells: list[Child] = [i + 1]
    if rows_kind:
        cells += [_near(token.by_cosine), _near(token.by_distance)]
    cells.append(_moved(token))
    if left:
        cells.append(_loss_change(left, i))
        cells += [_change(left.accuracy_change.get(i), 3)] if left.accuracy_change else []
    return cells


def _moved(token: VirtualToken) -> Child:
    if token.moved is None:
        return ""
    share = "" if token.moved_share is None else f" ({100 * token.moved_share:.0f} %)"
    return joined([f"{token.moved:#.3g}", el("small", share)])


def _near(found: Sequence[Near]) -> Markup:
    return joined(
        el("span", el("code", shown(text)), el("small", f"{value:.3f}"), class_="near") for text, value in found
    )


def shown(token: str) -> str:
    """A token with its white space to be seen."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def _loss_change(left: LeftOut, i: int) -> Child:
    if i not in left.loss_change:
        return "not tried"
    low_high = ", ".join(_change(bound, 3) for bound in left.loss_interval[i])
    return joined([_change(left.loss_change[i], 3), " ", el("small", f"[{low_high}]")])


def _change(value: float | None, digits: int) -> str:
    return "not tried" if value is None else f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def spread(found: Spread) -> Markup | None:
    """How far trainings lie apart: by learning rate, initialiser, and what else they differ in."""
    trials = [t for t in found.trials if math.isfinite(float(t["score"]))]
    if len(found.trials) < 2 or not trials:
        return None
    groups: dict[str, list[Point]] = {}
    for t in trials:
        if float(t["lr"]) > 0:  # the axis is logarithmic
            groups.setdefault(str(t["init"]), []).append((float(t["lr"]), float(t["score"])))
    rates = [
        el("h3", "By learning rate"),
        scatter_chart(groups, "learning rate", found.measure),
        legend(list(groups)) if len(groups) > 1 else None,
    ] if groups else []  # fmt: skip
    facets = [name for name in FACETS if name == "init" or len({str(t.get(name)) for t in trials}) > 1]
    strips = [el("div", *_strip(trials, name, found.measure)) for name in facets]
    better = "less is better" if found.lower else "more is better"
    lost = len(found.trials) - len(trials)
    note = f"{len(found.trials)} trainings; a dot is one. {found.measure[:1].upper()}{found.measure[1:]}: {better}."
    note += f" {lost} without a finite value left out." if lost else ""
    return section(
        "Trainings side by side",
        el("div", el("div", *rates) if rates else None, *strips, class_="pair"),
        el("details", el("summary", "All trainings"), _trials(found)),
        note=note,
    )


def _strip(trials: Sequence[Trial], facet: str, measure: str) -> list[Markup]:
    values: dict[str, list[float]] = {}
    for t in trials:
        values.setdefault(str(t.get(facet)), []).append(float(t["score"]))
    rows = [Marks(name, dots, kind="soft") for name, dots in values.items()]
    return [el("h3", f"By {FACETS[facet]}"), row_chart(rows, measure)]


def _trials(found: Spread) -> Markup:
    names = [n for n in ("init", "lr", "seed", "virtual_tokens", "method", "rung") if any(n in t for t in found.trials)]
    sign = 1 if found.lower else -1
    ordered = sorted(found.trials, key=lambda t: (math.isnan(float(t["score"])), sign * float(t["score"])))
    rows = [
        [f"{float(t['score']):.4f}", *(f"{t[n]:g}" if n == "lr" else t.get(n, "") for n in names),
         "kept" if t.get("kept") else ""]
        for t in ordered
    ]  # fmt: skip
    return table(["score", *(n.replace("_", " ") for n in names), ""], rows, "stack")


def settings(facts: ReportFacts) -> Markup:
    """The recipe, what the training was, and the libraries' versions."""
    training = {k: v for k, v in facts.sidecar.training.items() if v is not None}
    parts = [
        el("div", el("h3", "Training"), _pairs({k.replace("_", " "): v for k, v in training.items()})),
        el("div", el("h3", "Keys that differ from their defaults"), _pairs(facts.changed),
           el("h3", "Versions"), _pairs(facts.sidecar.versions)),
    ]  # fmt: skip
    whole = el("details", el("summary", "The whole recipe"), el("pre", facts.recipe)) if facts.recipe else None
    return section("Configuration", el("div", *parts, class_="pair"), whole)


def _pairs(facts: Mapping[str, object]) -> Markup:
    pairs = [part for name, value in facts.items() for part in (el("dt", name), el("dd", shortened(str(value), 300)))]
    return el("dl", *pairs, class_="facts")
