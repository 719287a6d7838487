"""``report.html``: its figures against independent ones, its texts as texts, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword
import tiny
from conftest import ROWS, Cli
from foreword.artifact.hub import SHARED_FILES
from foreword.artifact.sidecar import Sidecar, read_sidecar
from foreword.data.sources import rows_table
from foreword.errors import ForewordError
from foreword.evaluation.evaluate import Outcome
from foreword.evaluation.metrics import calibration_error
from foreword.jobs.load import Foreword
from foreword.jobs.report import Scored, bins, curves, write_report, wrong_rows
from foreword.jobs.virtual import describe, evenly, leave_one_out, nearest, rows_read
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Task
from foreword.report.charts import smoothed, thinned
from foreword.report.facts import Curves, LeftOut, ReportFacts, Sample, Spread, VirtualToken, WrongRow
from foreword.report.markup import el, escaped, shortened
from foreword.report.page import REPORT, page
from foreword.report.svg import Scale, across

HOSTILE = """</script><script>x()</script><img src=x onerror=alert(1)> & " ' <b>"""
TABLE = [{"text": text, "label": label} for text, label in ROWS]
HELD_OUT = [{"text": f"{text} {HOSTILE}", "label": label} for text, label in ROWS]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """A run of each kind."""
    out = tmp_path_factory.mktemp("runs")

    def train(name: str, **choices: Any) -> None:
        given = {"label": "label", **({} if "template" in choices else {"text": "text"}), **choices}
        given["prompt"] = {"virtual_tokens": 4, **given.get("prompt", {})}
        given["train"] = {"epochs": 2, "batch_size": 2, "lr": 0.05, **given.get("train", {})}
        foreword.train(out=out / name, model=str(model_folder), quiet=True, **given)

    train("classes", data=TABLE, eval_data=HELD_OUT)
    train("prefix", data=TABLE, eval_data=HELD_OUT, prompt={"method": "prefix-tuning"})
    train("unscored", data=TABLE, prompt={"virtual_tokens": 40, "init": "random"})
    written = [{"text": text, "label": f"{text} so {label}"} for text, label in ROWS]
    train("writer", data=written, eval_data=written, template="Q {text} A:")
    (out / "train.jsonl").write_text("\n".join(json.dumps(r) for r in TABLE * 2))
    sections = {"path": str(out / "train.jsonl"), "validation_fraction": 0.3, "folds": 2}
    some = {"lr": [0.01, 0.05], "select": "loss"}
    train("population", data=sections, prompt={"init": ["text", "vocabulary"]}, train=some)
    return {f.name: f for f in out.iterdir() if f.is_dir()}


class Read(HTMLParser):
    """What a browser would see: elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def read(run: Path) -> Read:
    found = Read((run / REPORT).read_text(encoding="utf-8"))
    assert found.open == []
    return found


def sidecar_of(run: Path) -> Sidecar:
    found = read_sidecar(run)
    assert found is not None
    return found


# --- the pages of real runs ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classes", "prefix", "unscored", "writer", "population"])
def test_a_page_asks_nobody_and_runs_nothing(runs: dict[str, Path], name: str) -> None:
    text = (runs[name] / REPORT).read_text(encoding="utf-8")
    found = read(runs[name])
    assert not {"script", "img", "link", "iframe", "b", "a"} & {tag for tag, _ in found.tags}
    assert not [a for _, attrs in found.tags for a in attrs if a in ("src", "href") or a.startswith("on")]
    assert not re.search(r"https?://|@import|url\(", text)
    assert ("default-src 'none'; style-src 'unsafe-inline'") in [attrs.get("content") for _, attrs in found.tags]
    assert f"<title>{name}: Foreword report</title>" in text


def test_the_page_of_a_classifier(runs: dict[str, Path]) -> None:
    found, scores = read(runs["classes"]), sidecar_of(runs["classes"]).scores
    assert found.texts["h2"] == [
        "Scores beside their baselines", "Training", "Classes", "Calibration", "Worst errors", "Virtual tokens",
        "Configuration",
    ]  # fmt: skip
    low, high = scores["intervals"]["accuracy"]
    assert f"accuracy, 95 % interval {low:.3f} to {high:.3f}" in found.texts["p"]
    assert f"10 rows: {scores['protocol']}." in found.texts["p"]
    assert {"this soft prompt", "majority class", "zero-shot"} <= set(found.texts["th"])
    counts = [n for row in scores["confusion"]["counts"] for n in row]
    heat = [
        text for text, (_, a) in zip(found.texts["td"], cells(found), strict=True) if "--share" in (a["style"] or "")
    ]
    assert list(map(int, heat)) == counts
    said = [h for h in found.texts["td"] if HOSTILE.split()[0] in h]
    assert len(said) == 10 - round(10 * scores["accuracy"])


def cells(found: Read) -> list[tuple[str, dict[str, str | None]]]:
    return [(tag, {"style": None, **attrs}) for tag, attrs in found.tags if tag == "td"]


def test_the_page_of_a_writer(runs: dict[str, Path]) -> None:
    found = read(runs["writer"])
    assert "Samples" in found.texts["h2"]
    assert not {"Classes", "Calibration", "Worst errors"} & set(found.texts["h2"])
    assert "my parcel is late so complaint" in found.texts["td"]
    assert {"exact match", "loss"} <= set(found.texts["th"])
    assert any(p.startswith("exact match, 95 % interval") for p in found.texts["p"])


def test_the_page_of_a_population(runs: dict[str, Path]) -> None:
    found = read(runs["population"])
    assert {"Trainings side by side", "Training"} <= set(found.texts["h2"])
    assert {"By learning rate", "By initialiser"} <= set(found.texts["h3"])
    lines = [a["class"] for tag, a in found.tags if tag == "path"]
    charts = 4  # training loss; validation loss, accuracy and macro-F1
    assert lines.count("thin") == 3 * charts
    assert lines.count("strong") == charts
    assert any("The soft prompt was trained on these rows" in p for p in found.texts["p"])
    assert found.texts["td"].count("kept") == 1


def test_the_page_of_a_prefix(runs: dict[str, Path]) -> None:
    found = read(runs["prefix"])
    assert "nearest by cosine" not in found.texts["th"]
    assert {"moved", "loss change", "accuracy change"} <= set(found.texts["th"])
    assert any(p.startswith("Keys and values have no nearest words") for p in found.texts["p"])


def test_the_page_of_an_unscored_run(runs: dict[str, Path]) -> None:
    found = read(runs["unscored"])
    assert found.texts["h2"] == ["Not scored", "Training", "Virtual tokens", "Configuration"]
    assert "loss change" not in found.texts["th"]
    assert len(found.texts["tr"]) == 1 + 40


def test_show_names_the_report(runs: dict[str, Path], cli: Cli) -> None:
    code, out, _ = cli("show", runs["classes"])
    assert code == 0
    assert f"report       {runs['classes'] / REPORT}" in out.splitlines()
    assert "report " not in cli("show", runs["population"] / "members" / "00")[1]


def test_the_report_stays_at_home() -> None:
    assert REPORT not in SHARED_FILES


# --- figures against independent ones -------------------------------------------------------------


def test_nearest_tokens_are_numpys() -> None:
    backbone = tiny.backbone(dtype=torch.float32)
    rows = torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(1)).double()
    words = backbone.embedding.weight.detach().double().numpy()[: len(backbone.tokenizer)]  # type: ignore[operator]
    for row, (by_cosine, by_distance) in zip(rows.numpy(), nearest(backbone, rows), strict=True):
        cosines = words @ row / np.linalg.norm(words, axis=1) / np.linalg.norm(row)
        distances = np.linalg.norm(words - row, axis=1)
        assert [c for _, c in by_cosine] == pytest.approx(np.sort(cosines)[::-1][:3])
        assert [d for _, d in by_distance] == pytest.approx(np.sort(distances)[:3])
        names = backbone.tokenizer.batch_decode([[i] for i in np.argsort(distances)[:3]])
        assert all(a == b or "\ufffd" in b for (a, _), b in zip(by_distance, names, strict=True))


def test_moved_is_the_distance_from_the_start() -> None:
    values = torch.eye(2, tiny.HIDDEN) * 3
    start = torch.eye(2, tiny.HIDDEN)
    tokens = describe(tiny.backbone(), SoftPrompt(values), SoftPrompt(start))
    assert [(t.moved, t.moved_share) for t in tokens] == [(2.0, 2.0)] * 2
    assert describe(tiny.backbone(), SoftPrompt(values), None)[0].moved is None


@pytest.mark.parametrize("name", ["classes", "prefix", "writer"])
def test_leave_one_out_is_the_smaller_soft_prompt(runs: dict[str, Path], name: str, model_folder: Path) -> None:
    """Against a new soft prompt of the other tokens, scored as if it had been trained so."""
    task = foreword.load(runs[name], model=str(model_folder))
    rows = TABLE[:7]
    examples = task.encoder.examples(rows_table(rows))
    found = leave_one_out(task.backbone, task.prompt, examples, task.encoder.label_ids, "rows")
    assert found.rows == found.scored == 7

    def evaluated(kept: list[int]) -> dict[str, Any]:
        prompt = SoftPrompt(task.prompt.values[kept], task.prompt.kind)
        adapter = replace(task.adapter, prompt=prompt)
        return dict(Foreword(adapter, task.backbone, task.task).evaluate(rows))

    whole = evaluated([0, 1, 2, 3])
    assert found.loss == pytest.approx(whole["loss"], abs=1e-4)
    for k in range(4):
        assert found.loss_interval[k][0] <= found.loss_change[k] <= found.loss_interval[k][1]
        less = evaluated([i for i in range(4) if i != k])
        assert found.loss_change[k] == pytest.approx(less["loss"] - whole["loss"], abs=2e-4)
        if name != "writer":
            assert found.accuracy_change[k] == pytest.approx(less["accuracy"] - whole["accuracy"])


def test_rows_left_out_are_of_every_class() -> None:
    """Files alternate their classes, or sort them."""
    backbone = tiny.backbone()
    examples = [
        Example(i, (*range(tiny.VOCAB, tiny.VOCAB + 4), 20 + i), ((5, 0), (6, 0))[i % 2], i % 2) for i in range(40)
    ]
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[2])
        return np.zeros(len(args[2])), np.ones(len(args[2]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foreword.jobs.virtual._judged", spy)
        leave_one_out(backbone, SoftPrompt(torch.zeros(4, tiny.HIDDEN)), examples, ((5, 0), (6, 0)), "rows")
    assert [e.label for e in seen[0]] == [0] * 5 + [1] * 5
    assert len(seen) == 5


@given(st.integers(1, 3000), st.integers(1, 32))
def test_leave_one_out_costs_about_what_scoring_did(scored: int, tokens: int) -> None:
    rows = rows_read(scored, tokens, "cpu")
    assert 1 <= rows <= min(scored, 100)
    assert rows * tokens <= max(scored, 8 * tokens)


@given(st.integers(0, 500), st.integers(1, 100))
def test_chosen_evenly(size: int, most: int) -> None:
    found = evenly(size, most)
    assert len(found) == min(size, most)
    gaps = np.diff(found)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_bins_add_up_to_the_calibration_error() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 200)
    truth = rng.integers(0, 3, 200)
    found = bins(Outcome(truth.tolist(), [1] * 200, [0.0] * 200, probabilities))
    error = sum(b.rows * abs(b.confidence - b.accuracy) for b in found) / 200
    assert error == pytest.approx(calibration_error(truth, probabilities))
    assert sum(b.rows for b in found) == 200


def test_the_worst_errors_come_first() -> None:
    probabilities = np.asarray([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    examples = [Example(i + 1, (1,), (2, 0), y) for i, y in enumerate((0, 0, 0, 1))]
    outcome = Outcome([0, 0, 0, 1], [2] * 4, [0.0] * 4, probabilities)
    task = Task("{a} and {b}", " ", "label", ("x", "y"), ("x", "y"))
    found = wrong_rows(task, Scored(examples, [{"a": i, "b": "t"} for i in range(4)], outcome, ((2, 0), (3, 0))))
    assert found == [WrongRow(3, "a: 2 | b: t", "x", "y", 0.2, 0.8), WrongRow(2, "a: 1 | b: t", "x", "y", 0.4, 0.6)]


def test_curves_are_those_of_the_metrics_file(runs: dict[str, Path]) -> None:
    events = [json.loads(line) for line in (runs["population"] / "metrics.jsonl").read_text().splitlines()]
    found = curves(runs["population"], kept=1)
    assert len(found.loss) == 4
    assert found.loss[2] == [(e["step"], e["losses"][2]) for e in events if e["event"] == "step"]
    checks = [e for e in events if e["event"] == "validation" and e["member"] == 3]
    assert found.validation["accuracy"][3] == [(e["step"], e["accuracy"]) for e in checks]
    assert curves(runs["population"] / "members") == Curves()


def test_lines_are_thinned_and_smoothed() -> None:
    points = [(float(i), float(i % 7)) for i in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert smoothed(points, 3)[50][1] == pytest.approx(sum(y for _, y in points[48:51]) / 3)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_scales_hold_their_values_with_few_round_ticks(values: list[float]) -> None:
    x = across(values, pad=0.05)
    assert all(x.start - 0.1 <= x(v) <= x.end + 0.1 for v in values)
    assert 1 <= len(x.ticks) <= 7


def test_ticks_have_the_digits_that_tell_them_apart() -> None:
    x = Scale(7.781, 7.789, 0, 100)
    assert [x.label(t) for t in x.ticks] == ["7.782", "7.784", "7.786", "7.788"]
    assert [Scale(0, 1200, 0, 1).label(t) for t in (0, 500, 1000)] == ["0", "500", "1000"]
    assert [Scale(0.001, 1, 0, 1, log=True).label(t) for t in (0.001, 0.1)] == ["0.001", "0.1"]


def test_a_logarithmic_scale_has_powers_of_ten() -> None:
    assert Scale(0.0005, 2, 0, 1, log=True).ticks == [0.001, 0.01, 0.1, 1.0]
    assert Scale(0.002, 0.02, 0, 1, log=True).ticks == pytest.approx([0.002, 0.005, 0.01, 0.02])


# --- given trials, odd runs -----------------------------------------------------------------------


def rewritten(run: Path, model: Path, out: Path, **more: Any) -> Read:
    shutil.copytree(run, out)
    task = foreword.load(out, model=str(model))
    assert write_report(out, task.backbone, task.prompt, "packed", **more) == out / REPORT
    return read(out)


def test_trials_of_a_tuning_are_shown(runs: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    trials = [
        {"init": init, "lr": lr, "virtual_tokens": 8, "method": method, "score": score, "rung": rung}
        for init, lr, method, score, rung in [
            ("text", 0.01, "prompt-tuning", 0.6, 0), ("text", 0.3, "residual", 0.8, 1),
            ("random", 0.1, "prompt-tuning", float("nan"), 0),
        ]
    ]  # fmt: skip
    found = rewritten(runs["classes"], model_folder, tmp_path / "x", spread=Spread(trials, "mean accuracy of 3 folds"))
    assert {"By learning rate", "By initialiser", "By method", "By rung"} <= set(found.texts["h3"])
    assert "By virtual tokens" not in found.texts["h3"]
    assert any("1 without a finite value left out" in p for p in found.texts["p"])


def test_a_run_without_recipe_and_curves_has_a_page(runs: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copytree(runs["classes"], tmp_path / name)
        (tmp_path / name / name).unlink()
    found = rewritten(tmp_path / "metrics.jsonl", model_folder, tmp_path / "y")
    assert "Training" not in found.texts["h2"]
    found = rewritten(tmp_path / "recipe.yaml", model_folder, tmp_path / "z")
    assert "pre" not in found.texts


def test_a_folder_without_sidecar_is_refused(runs: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    task = foreword.load(runs["classes"], model=str(model_folder))
    with pytest.raises(ForewordError, match=r"no foreword\.json"):
        write_report(tmp_path, task.backbone, task.prompt, "packed")


def test_one_virtual_token_can_be_left_out() -> None:
    backbone = tiny.backbone()
    examples = [Example(i, (5, 20 + i), (6, 0), None, "x") for i in range(3)]
    prefix = SoftPrompt(torch.randn(1, backbone.geometry.width).double(), "prefix")
    found = leave_one_out(backbone, prefix, examples, (), "rows")
    assert found.accuracy is None
    assert list(found.loss_change) == [0]
    assert found.accuracy_change == {}


# --- hostile texts --------------------------------------------------------------------------------


def facts_of(text: str) -> ReportFacts:
    scores = {
        "n": 2, "accuracy": 0.5, "loss": 1.0, "protocol": text, "calibration_error": 0.1,
        "per_class": {text: {"n": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}},
        "confusion": {"classes": [text], "counts": [[2]]},
        "intervals": {"accuracy": [0.1, 0.9], "loss": [0.5, 1.5], "calibration_error": [0.0, 0.2]},
        "baselines": {text: {"accuracy": 0.3, "intervals": {"accuracy": [0.1, 0.5]}}},
    }  # fmt: skip
    task = Task("{a}" + text, text, text, (text,), (text,))
    sidecar = Sidecar(task, {"name": text}, scores, {"method": text, text: text}, {text: text})
    near = [(text, 0.5)] * 3
    return ReportFacts(
        text, sidecar, "rows", [VirtualToken(near, near, 0.5, 0.5)],
        Curves([[(1, 2.0), (2, 1.0)]], {text: [[(1, 0.5)]]}),
        wrong=[WrongRow(1, text, text, text, 0.1, 0.9)], wrong_count=1, samples=[Sample(1, text, text, text, 1.0)],
        left_out=LeftOut(2, 2, 1.0, 0.5, {0: 0.1}, {0: (0.0, 0.2)}, {0: 0.0}),
        spread=Spread([{"init": text, "lr": 0.1, "score": 0.5}, {"init": text, "lr": 0.2, "score": 0.6}], text),
        recipe=text, changed={text: text},
    )  # fmt: skip


def test_of_many_virtual_tokens_those_that_moved_furthest_are_shown_at_once() -> None:
    tokens = [VirtualToken([], [], float(i % 100), 0.5) for i in range(256)]
    whole = page(replace(facts_of("x"), kind="prefix", tokens=tokens))
    shown, _, folded = whole[whole.index("Virtual tokens</h2>") :].partition("<details>")
    assert [f'"row" data-title="token">{i + 1}<' in shown for i in range(256)] == [i % 100 >= 92 for i in range(256)]
    assert "All 256" in folded
    assert all(f'"row" data-title="token">{i + 1}<' in folded for i in range(256))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([HOSTILE, "a", "<", "&lt;", "\x00\ud800", "]]>", "<!--", "x" * 500])
    | st.text(min_size=1, max_size=40)
)
def test_no_text_becomes_markup(text: str) -> None:
    made = page(facts_of(text)).encode("utf-8", "replace").decode()
    plain = Read(page(facts_of("plain")))
    found = Read(made)
    assert found.open == []
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    assert [set(attrs) for _, attrs in found.tags] == [set(attrs) for _, attrs in plain.tags]


def test_markup_escapes_what_is_not_markup() -> None:
    assert el("p", HOSTILE, el("br"), None, 3, class_='a"b') == (
        '<p class="a&quot;b">' + str(escaped(HOSTILE)) + "<br/>3</p>"
    )
    assert shortened("a  b\n" + "c" * 300, 200) == "a b " + "c" * 195 + "…"


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright's Python package is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@needs_chromium
@pytest.mark.parametrize("name", ["classes", "prefix", "unscored", "writer", "population"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_opens_without_complaint_and_fits(
    runs: dict[str, Path], browser: Any, name: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened, complaints, asked = context.new_page(), [], []
    opened.on("console", lambda said: complaints.append(said.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(dialog.message))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto((runs[name] / REPORT).as_uri())
    opened.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    clipped = "all => all.filter(t => { const a = t.getBBox(), v = t.ownerSVGElement.viewBox.baseVal; \
        return a.x < -1 || a.x + a.width > v.width + 1 || a.y < -1 || a.y + a.height > v.height + 1; }).length"
    assert opened.locator("svg text").evaluate_all(clipped) == 0
    light = opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(245, 245, 242)"
    assert light == (scheme == "light")
    context.close()
    assert complaints == []
    assert len(asked) == 1
