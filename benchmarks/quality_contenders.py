"""Who is compared in the honest table: each takes training rows and labels test rows.

No contender sees a test row's label, and nobody chooses anything by test rows.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import opponents
import ours
from quality_data import DataSet, Labelled, Split, by_class

import foreword
from foreword.backbone.attach import no_prompt
from foreword.backbone.choose import choose_layout
from foreword.backbone.load import Backbone, load_backbone
from foreword.config import DataConfig, ModelConfig, PromptConfig, Recipe, TrainConfig, TuneConfig
from foreword.data.encode import Encoder
from foreword.data.sources import rows_table
from foreword.data.template import parse
from foreword.evaluation.scoring import classify
from foreword.jobs.candidates import search_epochs
from foreword.jobs.prepare import embedded, make_encoder
from foreword.prompts.initialisers import from_text
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment, Task

GUIDE_TOKENS, GUIDE_EPOCHS, GUIDE_BATCH = 8, 50, 8
C_GRID = (0.1, 1.0, 10.0, 100.0, 1000.0)
LARGEST_GRID_FOLDS = 5


@dataclass(frozen=True)
class Bench:
    """What all contenders of a run share."""

    model: str
    few_shot_tokens: int = 1024
    minutes: float = TuneConfig().minutes
    """Time of one ``foreword tune``."""
    trainings: float = 0.0
    """Instead of minutes: its budget in trainings on all rows."""
    members: int = TuneConfig().members
    """Members of its ensemble."""
    guide_epochs: int = GUIDE_EPOCHS
    dtype: str = "auto"
    """Of the backbone: bfloat16 is twice as fast on processors that have it."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Keys over Foreword's defaults: for dry runs only."""

    @property
    def tune(self) -> dict[str, Any]:
        """Keys of one ``foreword tune``."""
        budget = {"minutes": 0.0, "trainings": self.trainings} if self.trainings else {"minutes": self.minutes}
        return {**budget, "members": self.members}

    @property
    def budget(self) -> str:
        """What one ``foreword tune`` may spend, in words."""
        return f"{self.trainings:g} trainings" if self.trainings else f"{self.minutes:g} minutes"

    @property
    def config(self) -> ModelConfig:
        """The backbone and how it is loaded."""
        return ModelConfig(self.model, dtype=self.dtype)

    @property
    def keys(self) -> dict[str, str]:
        """The same for ``foreword.train``."""
        return {"id": self.model, "dtype": self.dtype}

    @cached_property
    def backbone(self) -> Backbone:
        """Loaded once, for those that do not train through ``foreword.train``."""
        return load_backbone(self.config)


@dataclass(frozen=True)
class Answer:
    """A label for each test row, and what is worth keeping about how it came about."""

    labels: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One training: rows, seed and an empty folder to write to."""

    bench: Bench
    data: DataSet
    split: Split
    seed: int
    folder: Path


def majority(job: Job) -> dict[str, Answer]:
    """The commonest label for every row."""
    return {"majority": Answer([job.split.commonest] * len(job.split.test))}


def tfidf(job: Job) -> dict[str, Answer]:
    """Word 1-2-grams and logistic regression, its C by cross-validation on the training rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    texts, labels = [r["text"] for r in job.split.train], [r["label"] for r in job.split.train]
    count = min(LARGEST_GRID_FOLDS, *Counter(labels).values())
    search = GridSearchCV(
        make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": C_GRID},
        cv=StratifiedKFold(count, shuffle=True, random_state=job.seed),
    ).fit(texts, labels)
    said = search.predict([r["text"] for r in job.split.test])
    return {"tfidf": Answer([str(s) for s in said], {"c": search.best_params_["logisticregression__C"]})}


def zero_shot(job: Job) -> dict[str, Answer]:
    """The backbone with the template alone."""
    backbone = job.bench.backbone
    return {"zero-shot": Answer(label(backbone, no_prompt(backbone), job.data.template, job.split))}


def few_shot(job: Job) -> dict[str, Answer]:
    """The backbone with training rows in front: the classes in turn, as many as fit, their order by the seed."""
    backbone = job.bench.backbone
    opening, shots = examples(job, min(job.bench.few_shot_tokens, backbone.window // 2))
    labels = label(backbone, no_prompt(backbone), job.data.template, job.split, opening=opening)
    return {"few-shot": Answer(labels, {"shots": shots, "opening_tokens": len(opening)})}


def examples(job: Job, limit: int) -> tuple[tuple[int, ...], int]:
    """Ids of solved rows, one a line and whole rounds of all classes, and how many rows they are."""
    rng, tokenizer = random.Random(job.seed), job.bench.backbone.tokenizer
    groups = [rng.sample(group, len(group)) for group in by_class(job.split.train).values()]
    lines: list[str] = []
    for rows in zip(*groups, strict=False):
        # A row too many would favour its class, so a round counts as a whole.
        more = [*lines, *(solved(job.data.template, row) for row in rows)]
        if len(tokenizer("".join(more))["input_ids"]) > limit:
            break
        lines = more
    rng.shuffle(lines)
    return tuple(tokenizer("".join(lines))["input_ids"]), len(lines)


def solved(template: str, row: Labelled) -> str:
    """A row with its label, as a line."""
    return f"{parse(template).render(row)} {row['label']}\n"


def guide(job: Job) -> dict[str, Answer]:
    """The guide's recipe and tokenisation in Foreword's loop: same loss and updates, without its pads."""
    bench, split = job.bench, guided(job)
    recipe = Recipe(
        model=bench.config,
        data=DataConfig(template="{text}", separator="", label="label", task="classify"),
        prompt=PromptConfig(virtual_tokens=GUIDE_TOKENS, init_text=job.data.instruction),
        train=TrainConfig(lr=opponents.PROMPT_RATE, epochs=bench.guide_epochs, batch_size=GUIDE_BATCH, seed=job.seed),
    )
    task = foreword.train(recipe, data=split.train, out=job.folder / "guide", quiet=True)
    return {"guide": Answer(predicted(task, split.test))}


def guide_peft(job: Job) -> dict[str, Answer]:
    """The guide's loop in PEFT itself; scored like everybody by label words, on rows without pads.

    Rows are padded on the left to 64 tokens as there, but longer ones are not cut, which would
    lose their labels.
    """
    backbone, split = job.bench.backbone, guided(job)
    encoder = encoder_for(backbone, "{text}", "", split, 0)
    rows = tuple(encoder.examples(rows_table(split.train)))
    start = from_text(backbone.tokenizer(job.data.instruction)["input_ids"], lambda ids: embedded(backbone, ids))
    rival = opponents.guide(
        ours.Setting(backbone, rows, encoder.label_ids, start(GUIDE_TOKENS), job.bench.guide_epochs)
    )
    rival.length = max(opponents.GUIDE_LENGTH, *(len(e.context) + len(e.target) for e in rows))
    rng = random.Random(job.seed)
    for _ in range(job.bench.guide_epochs):
        order = rng.sample(rows, len(rows))
        for at in range(0, len(order), GUIDE_BATCH):
            rival.step(order[at : at + GUIDE_BATCH])
    learnt = SoftPrompt(rival.model.prompt_encoder["default"].embedding.weight.detach().clone())
    return {"guide-peft": Answer(label(backbone, learnt, "{text}", split, separator=""))}


def guided(job: Job) -> Split:
    """The rows as the guide tokenises them: the whole input with its space at the end, the label without one."""

    def inputs(rows: Sequence[Labelled]) -> tuple[Labelled, ...]:
        template = parse(job.data.template)
        return tuple({"text": f"{template.render(r)} ", "label": r["label"]} for r in rows)

    return replace(job.split, train=inputs(job.split.train), test=inputs(job.split.test))


def default(job: Job) -> dict[str, Answer]:
    """``foreword.train`` as it comes."""
    task = foreword.train(
        model=job.bench.keys, data=job.split.train, template=job.data.template, label="label",
        out=job.folder / "default", train={"seed": job.seed, **job.bench.train}, quiet=True,
    )  # fmt: skip
    return {"default": Answer(predicted(task, job.split.test))}


def context(job: Job) -> dict[str, Answer]:
    """``foreword.train`` by context tuning, for as many epochs as ``foreword tune`` trains."""
    epochs = search_epochs(len(job.split.train), len(by_class(job.split.train)))
    task = foreword.train(
        model=job.bench.keys, data=job.split.train, template=job.data.template, label="label",
        out=job.folder / "context", prompt={"method": "context-tuning"},
        train={"seed": job.seed, "epochs": epochs, **job.bench.train}, quiet=True,
    )  # fmt: skip
    return {"context": Answer(predicted(task, job.split.test))}


def tune(job: Job) -> dict[str, Answer]:
    """``foreword tune`` on the rows alone, in its own wording: ensemble and best member, with what it expects."""
    return searched(job, "tune", {}, text="text")


def tune_given(job: Job) -> dict[str, Answer]:
    """``foreword tune`` in the template and label words that everybody has."""
    return searched(job, "tune-given", {"wording": "given"}, template=job.data.template)


def searched(job: Job, name: str, keys: Mapping[str, Any], **data: str) -> dict[str, Answer]:
    """The answers of one search, with these ``tune`` keys: of its ensemble and of its best member alone."""
    out, bench = job.folder / name, job.bench
    foreword.tune(
        model=bench.keys, data=job.split.train, label="label", out=out, **data,
        tune={**bench.tune, **keys, "seed": job.seed}, train=bench.train, quiet=True,
    )  # fmt: skip
    said = json.loads((out / "tune.json").read_text())
    first = out / "members" / "00"
    found = {}
    for part, folder, key in (
        ("single", first if first.is_dir() else out, "expected_single"),
        ("ensemble", out, "expected"),
    ):
        labels = predicted(foreword.load(folder, model=bench.model, dtype=bench.dtype), job.split.test)
        facts = {"budget": bench.budget, "members": said["members"], "expected": stated(said[key])}
        found[f"{name}-{part}"] = Answer(labels, facts)
    return found


def stated(expected: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy and macro-F1 that tune expects, with its intervals."""
    keys = ("accuracy", "macro_f1")
    return {key: {"value": expected[key], "interval": expected.get("intervals", {}).get(key)} for key in keys}


def predicted(task: Any, rows: Sequence[Labelled]) -> list[str]:
    """Labels of rows whose own labels stay behind."""
    return [p.label for p in task.predict([{"text": r["text"]} for r in rows])]


def label(
    backbone: Backbone,
    prompt: SoftPrompt,
    template: str,
    split: Split,
    separator: str = " ",
    opening: tuple[int, ...] = (),
) -> list[str]:
    """The likeliest label words of each test row, in Foreword's own scoring.

    Args:
        backbone: the model.
        prompt: a soft prompt; an empty one for the plain backbone.
        template: of a row.
        split: its training rows say which classes there are.
        separator: between context and label words.
        opening: ids read before every row, once for all.
    """
    encoder = encoder_for(backbone, template, separator, split, prompt.tokens, len(opening))
    bos = len(encoder.opening) if opening else 0  # the opening has brought its own
    rows = rows_table([{"text": r["text"]} for r in split.test])
    contexts = [(*opening, *context[bos:]) for context in encoder.contexts(rows)]
    ids, classes = encoder.label_ids, encoder.task.classes
    layout = choose_layout(backbone, prompt, [Segment(c, ids) for c in contexts], gradient=False).score
    return [classes[c] for c in classify(backbone, prompt, contexts, ids, layout).argmax(1).tolist()]


def encoder_for(
    backbone: Backbone, template: str, separator: str, split: Split, virtual_tokens: int, opening: int = 0
) -> Encoder:
    """Rows to ids behind so many virtual tokens, or so many tokens of an opening."""
    classes = tuple(by_class(split.train))
    task = Task(template, separator, "label", classes, classes)
    return make_encoder(task, backbone, virtual_tokens or opening, "rows" if virtual_tokens else "prefix")


CONTENDERS: dict[str, Callable[[Job], dict[str, Answer]]] = {
    "majority": majority,
    "tfidf": tfidf,
    "zero-shot": zero_shot,
    "few-shot": few_shot,
    "guide": guide,
    "guide-peft": guide_peft,
    "default": default,
    "context": context,
    "tune": tune,
    "tune-given": tune_given,
}
"""What ``--contenders`` takes, the cheapest first."""
ANSWERS: dict[str, tuple[str, ...]] = {name: (name,) for name in CONTENDERS} | {
    name: (f"{name}-single", f"{name}-ensemble") for name in ("tune", "tune-given")
}
"""The answers each of them gives."""
DRAWLESS = ("majority", "zero-shot")
"""Those that no draw of balanced training rows changes: one seed is all there is."""
