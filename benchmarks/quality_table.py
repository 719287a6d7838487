"""docs/results.md, from the newest result of benchmarks/quality.py.

.venv/bin/python benchmarks/quality_table.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality_data import ALL, CROSS_VALIDATED, DATA
from results import FOLDER, newest
from scipy.stats import t as student

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
LEVEL = 0.95
MISSING = "not measured"
Run = Mapping[str, Any]

NAMES: dict[str, str] = {
    "majority": "majority class",
    "tfidf": "TF-IDF + logistic regression",
    "zero-shot": "backbone, zero-shot",
    "few-shot": "backbone, few-shot in context",
    "guide": "guide recipe (Foreword's engine)",
    "guide-peft": "guide recipe (PEFT itself)",
    "default": "**`foreword train`**, defaults",
    "context": "**`foreword train`**, context tuning",
    "tune-single": "**`foreword tune`**, its best member",
    "tune-ensemble": "**`foreword tune`**, ensemble",
    "tune-given-single": "**`foreword tune`**, given wording, its best member",
    "tune-given-ensemble": "**`foreword tune`**, given wording, ensemble",
}
BACKBONES = {"smollm2-135m": "SmolLM2-135M-Instruct, dequantised from Q4_1"}
GOALS: tuple[tuple[str, str, str, float, float], ...] = (
    ("sst2", "32", "accuracy", 0.85, 0.90),
    ("trec", "96", "accuracy", 0.84, 0.90),
    ("sst2", ALL, "accuracy", 0.88, 0.91),
    ("trec", ALL, "accuracy", 0.93, 0.96),
    ("raft_complaints", CROSS_VALIDATED, "macro_f1", 0.75, 0.82),
)
"""Data set, size, metric, what must be reached and what is aimed at."""
OURS = ("default", "context", "tune-single", "tune-ensemble", "tune-given-ensemble")
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
HEAD = """\
# Results

<!-- made by benchmarks/quality_table.py from benchmarks/results; do not edit -->

What a soft prompt is worth beside what it competes with, on the same rows. `benchmarks/quality.py` measures,
`make results` writes this page from the stored numbers.

- **Rows.** A seed is another random draw of training rows, the same number of each class, so the classes are rarer
  or commoner in the test than in training. Size *all* is every training row, undrawn: there a seed changes only the
  contender's own randomness. Training rows whose text also stands in the test are left out, repeated texts too.
  *Cross-validation* pools the rows of five stratified folds, each scored by what was trained on the others;
  a seed is another division.
- **Honest.** No test row chooses anything: TF-IDF's C and all that `foreword tune` chooses come from training rows.
- **Intervals.** Mean over seeds with its 95 % t-interval (of three seeds or more), and the range in brackets. They hold
  how draws differ, not which test rows there are: 300 test rows by themselves are good to 0.03-0.06 in accuracy. A
  subset of test rows is the same for all contenders and seeds.
- **Same words.** One template a data set for everybody (below); who speaks answers with the label words that are
  likeliest, and never writes anything else. `foreword tune` stands there twice: as it comes, with a template and label
  words that it finds on the training rows, and with those that everybody has (*given wording*).
- **Age.** The runs of `foreword tune` are of several days' code (docs/log.md). The newest are, in their own wording,
  SST-2's, TREC's without draw 4 and AG News's draw 2, in the given one SST-2's draw 0, and the complaints' division 0;
  division 1 shared the weights otherwise. The other draws in the given wording are older than the model as it is as a
  candidate and chose members greedily, as did Subj's draws 0 and 1 and the first of AG News and CLINC150. Only the
  newest and the complaints had members in several wordings.

Contenders:

- **majority class**: the commonest of all rows that the draws are made from, as a balanced draw has none itself.
- **TF-IDF + logistic regression**: scikit-learn, words and pairs of words, C by cross-validation on the training rows.
- **few-shot in context**: solved training rows before each test row, as many whole rounds of all classes as fit
  1,024 tokens, in an order drawn by the seed. It needs them again with every request; a soft prompt needs its P tokens.
- **guide recipe**: PEFT's guide: P = 8 from a text, AdamW 3e-2, linear schedule, 50 epochs, batches of 8, the label
  after a space of its own. Scored by label words like the others. Rows are not cut to 64 tokens, which
  would lose the labels of long ones. *Foreword's engine*: the same hyperparameters and tokens in Foreword's loop.
- **`foreword train`**: the defaults, and context tuning for as many epochs as tune trains.
  **`foreword tune`**: what it finds in the stated time; *expected* is the score it states without having seen a test
  row, *covered* how often the interval it states held the test score.
"""


def page(result: Mapping[str, Any]) -> str:
    """The whole page."""
    lines = [HEAD]
    for model in dict.fromkeys(run["model"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["model"] == model]
        lines += [f"## {BACKBONES.get(model, model)}", "", *_made(result, runs), "", *_goals(runs)]
        for name, data in DATA.items():
            for size in data.sizes:
                lines += ["", *_block(name, size, [r for r in runs if (r["data"], r["size"]) == (name, size)])]
        lines.append("")
    return "\n".join([*lines, *_templates(result)]) + "\n"


def _made(result: Mapping[str, Any], runs: Sequence[Run]) -> Iterator[str]:
    machines = dict.fromkeys(f"{_machine(run['machine'])}, {run.get('dtype', 'float32')}" for run in runs)
    days = sorted({run["date"] for run in runs})
    yield f"Measured {days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'} on {'; '.join(machines)};"
    yield ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + f"; {result['file']}."


def _machine(machine: Mapping[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return str(machine["gpu"]) if "gpu" in machine else f"{machine['cpu']}, {threads}"


def _goals(runs: Sequence[Run]) -> Iterator[str]:
    """Each goal's verdict for each of ours, by the mean over seeds."""
    yield "### Against the goals"
    yield ""
    yield f"| data, training rows | metric | must | aim | {' | '.join(NAMES[c] for c in OURS)} |"
    yield "|---" * (4 + len(OURS)) + "|"
    for data, size, metric, must, aim in GOALS:
        there = [r for r in runs if (r["data"], r["size"]) == (data, size)]
        cells = [_verdict([r[metric] for r in _of(there, name)], must, aim) for name in OURS]
        yield f"| {data}, {size} | {METRICS[metric]} | {must:.2f} | {aim:.2f} | {' | '.join(cells)} |"


def _verdict(values: Sequence[float], must: float, aim: float) -> str:
    if not values:
        return MISSING
    mean = statistics.mean(values)
    word = "aim met" if mean >= aim else "must met" if mean >= must else "**missed**"
    return f"{mean:.3f} {word}"


def _block(data: str, size: str, runs: Sequence[Run]) -> Iterator[str]:
    """One data set at one size: every contender, measured or not."""
    yield f"### {data}, {f'{size} training rows' if size != CROSS_VALIDATED else size}"
    yield ""
    yield "| contender | seeds | training / test rows | accuracy | macro-F1 | expected accuracy | covered | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, title in NAMES.items():
        mine = _of(runs, name)
        if mine:
            budgets = " or ".join(dict.fromkeys(run["budget"] for run in mine if "budget" in run))
            yield f"| {' | '.join([', '.join(filter(None, (title, budgets))), *_cells(mine)])} |"
        elif name != "guide-peft":
            yield f"| {title} | 0 | | {MISSING} | {MISSING} | | | |"


def _of(runs: Sequence[Run], contender: str) -> list[Run]:
    """A contender's runs on the most test rows it was measured on."""
    mine = [r for r in runs if r["contender"] == contender]
    most = max((r["test_rows"] for r in mine), default=0)
    return [r for r in mine if r["test_rows"] == most]


def _cells(runs: Sequence[Run]) -> list[str]:
    rows = f"{runs[0]['train_rows']} / {runs[0]['test_rows']}"
    seconds = statistics.median(r["seconds"] for r in runs)
    figures = [spread([r[metric] for r in runs]) for metric in METRICS]
    return [str(len(runs)), rows, *figures, *_expectation(runs), f"{seconds:,.0f}"]


def spread(values: Sequence[float]) -> str:
    """``mean ± half of the t-interval [least, most]``; of two values without the interval, of one the value."""
    shown = f"{statistics.mean(values):.3f}"
    if len(values) > 2:
        half = student.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
        shown += f" ± {half:.3f}"
    return shown if len(values) == 1 else f"{shown} [{min(values):.3f}, {max(values):.3f}]"


def _expectation(runs: Sequence[Run]) -> tuple[str, str]:
    """Mean expected accuracy, and of how many stated intervals the test score lies within, for each metric."""
    stated = [r for r in runs if "expected" in r]
    if not stated:
        return "", ""
    mean = statistics.mean(r["expected"]["accuracy"]["value"] for r in stated)
    counts = [f"{word} {covered(stated, m)}" for m, word in METRICS.items()]
    return f"{mean:.3f}", ", ".join(counts)


def covered(runs: Sequence[Run], metric: str) -> str:
    """``k of n`` stated intervals that hold the test score."""
    pairs = [(r["expected"][metric]["interval"], r[metric]) for r in runs if r["expected"][metric]["interval"]]
    return f"{sum(low <= score <= high for (low, high), score in pairs)} of {len(pairs)}"


def _templates(result: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data, templates and label words"
    yield ""
    yield "| data | template | label words | text of the guide's recipe | rows |"
    yield "|---|---|---|---|---|"
    for name, facts in result["data"].items():
        words = ", ".join(facts["label_words"].values()) or "the labels themselves"
        yield f"| {name} | `{facts['template']}` | {words} | {facts['guide_text']} | {facts['rows']} |"


if __name__ == "__main__":
    PAGE.write_text(page(newest(FOLDER, "quality")[0]))
