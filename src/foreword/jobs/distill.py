"""A long text made into a few virtual tokens: the model that reads them learns from the model that reads the text.

Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): start from the keys and values of the text's first
tokens, keep the first as an attention sink, and learn the teacher's own next-token probabilities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from foreword.artifact.lock import run_folder
from foreword.backbone.attach import no_prompt, reading
from foreword.backbone.choose import Choice, choose_layout
from foreword.backbone.load import Backbone, load_backbone
from foreword.checks import check, check_distill
from foreword.config import Recipe, members
from foreword.data.encode import Encoder
from foreword.data.sources import file_name
from foreword.errors import ForewordError
from foreword.evaluation.agreement import agreement, candidates
from foreword.evaluation.evaluate import Outcome, label_counts, run_rows, scores_of, with_baselines
from foreword.evaluation.intervals import interval
from foreword.evaluation.scoring import Floats
from foreword.jobs.data import Splits, read_splits
from foreword.jobs.derive import write_derived
from foreword.jobs.fewshot import few_shot
from foreword.jobs.prepare import embedded, make_encoder, memory_explained
from foreword.jobs.study import Study, fifth, in_front, longest_row, of_rows, read_text, self_study
from foreword.jobs.train import MEMORY_KNOB, check_names, mark_started, same_run
from foreword.jobs.training import say, train_in
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.methods.registry import build, find, with_rates
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Segment, Task

FREE_TASK = Task("{text}", "", "label")
"""Of a text without rows: whatever is asked after it."""


@dataclass(frozen=True)
class _Outcome:
    """What was said on held-out rows: likeliest class or tokens, one array a row, and what scores come from."""

    said: list[Any]
    outcome: Outcome | None


def distill(recipe: Recipe, out: Path, resume: bool = False, console: Console | None = None) -> Backbone:
    """Makes a text, or labelled rows as few-shot examples, into a soft prompt and writes its folder.

    Args:
        recipe: all choices; ``distill`` says what is read, ``data`` (if given) which rows come after it.
        out: the run folder; new or empty unless ``resume``.
        resume: go on with the run in ``out``.
        console: where progress goes; None: nowhere.
    """
    console = console or Console(quiet=True)
    check_distill(recipe)
    splits = None
    if recipe.data.path:
        check(recipe)
        splits = read_splits(recipe.data)
    check_names(recipe)
    with run_folder(out, resume), memory_explained(MEMORY_KNOB):
        text = read_text(recipe.distill.text) if recipe.distill.text else ""
        digest = hashlib.sha256(f"{text}{splits.data_hash if splits else ''}".encode()).hexdigest()
        if resume:
            same_run(recipe, digest, out)
        job = _Distillation(recipe, splits, console)
        mark_started(recipe, digest, out)
        job.run(out)
    return job.backbone


class _Distillation:
    """What the stages share: backbone, the text as a teacher, and the rows that come after it."""

    def __init__(self, recipe: Recipe, splits: Splits | None, console: Console) -> None:
        self.recipe, self.splits, self.console = recipe, splits, console
        self.members = with_rates(members(recipe), recipe.prompt)
        self.backbone = load_backbone(recipe.model)
        self.backbone.geometry  # noqa: B018 (refuses models without keys and values before anything is read)
        self.task = splits.task if splits else FREE_TASK
        self.bare: Encoder = make_encoder(self.task, self.backbone, 0, "prefix")
        self.few_rows: tuple[int, ...] = ()
        self.text_ids = self._read()
        room = self.backbone.window - len(self.text_ids)
        needed = 2 if splits else longest_row(self.backbone, recipe.distill)
        if room < needed:
            raise ForewordError(
                f"the text has {len(self.text_ids)} tokens and needs {needed} more for what comes after it, "
                f"{self.backbone.name} reads {self.backbone.window}",
                recipe.distill.text or recipe.data.path,
                "give a shorter text",
            )
        self.encoder = make_encoder(self.task, self.backbone, len(self.text_ids), "prefix")
        self.teacher = reading(self.backbone, self.text_ids)
        self.methods = [self._method(m.seed) for m in self.members]
        say(console, f"teacher: {self.backbone.name} reading {len(self.text_ids)} tokens")

    def run(self, out: Path) -> None:
        """All stages; writes the folder."""
        study, labelled, layout = self._study()
        start = self.methods[0].soft_prompt()
        rows = in_front(study.train, self._virtual(start))
        own = self._layout(start, rows, gradient=True)
        trained = train_in(
            out, self.backbone, self.methods, self.members, rows, self.recipe.train, own, self.console,
            title="distilling",
        )  # fmt: skip
        best = trained.population.states[trained.population.best].kept
        made = best.soft_prompt()
        contenders = {
            "full text": (self.teacher, layout),
            "distilled": (made, own),
            f"its start, {start.tokens} tokens": (start, own),
            "no text": (no_prompt(self.backbone), layout),
        }
        outcomes = {name: self._outcome(who, study.held_out, how) for name, (who, how) in contenders.items()}
        source = self.recipe.distill.text or f"{len(self.few_rows)} rows of {file_name(self.recipe.data.path)}"
        facts = {
            "how": "distilled", "from": [source],
            "text_tokens": len(self.text_ids), "tokens_saved": len(self.text_ids) - made.tokens,
            "method": self.recipe.prompt.method, "quantize": self.backbone.rounding,
            **self._agreements(outcomes), **trained.figures,
        }  # fmt: skip
        scores = self._scores(outcomes) if labelled else {}
        write_derived(out, made, self.backbone, self.task, facts, scores, best.peft_type, self.recipe.prompt)
        say(self.console, f"tokens {len(self.text_ids)} -> {made.tokens}")

    def _read(self) -> tuple[int, ...]:
        """Token ids of what the teacher reads."""
        config = self.recipe.distill
        if config.text:
            return tuple(self.backbone.tokenizer(read_text(config.text))["input_ids"])
        assert self.splits is not None
        examples = self.bare.examples(self.splits.train)
        found = few_shot(self.bare, self.splits.train, examples, config.few_shot)
        self.few_rows = found.rows
        return found.ids

    def _study(self) -> tuple[Study, bool, Choice]:
        """What is learnt, with the teacher's targets, and what is held out (labelled or not)."""
        config = self.recipe.distill
        if self.splits is None:
            ids = self.text_ids
            layout = self._layout(self.teacher, [Segment(ids[:8], (ids[8:12],)), Segment(ids[4:9], (ids[9:12],))])
            say(self.console, f"self-study: {config.queries} openings, {config.answer_tokens} tokens after each")
            seed = self.members[0].seed
            return (
                self_study(self.backbone, self.teacher, ids, self.encoder.opening, config, seed, layout.train),
                False,
                layout,
            )
        rows = [e for i, e in enumerate(self.encoder.examples(self.splits.train)) if i not in set(self.few_rows)]
        held = self.encoder.examples(self.splits.held_out) if self.splits.held_out else []
        labelled = bool(held)
        if not held:
            held, rows = rows[: fifth(len(rows))], rows[fifth(len(rows)) :]
        if not rows:
            raise ForewordError(
                "every row is an example of the text, and none is left to learn from",
                self.recipe.data.path,
                "lower distill.few_shot",
            )
        layout = self._layout(self.teacher, [Segment(e.context, self.encoder.label_ids or (e.target,)) for e in rows])
        say(self.console, f"study: {len(rows)} rows, whose labels are not learnt; {len(held)} held out")
        train = list(of_rows(self.backbone, self.teacher, rows, self.encoder, config, layout.score))
        return Study(train, held), labelled, layout

    def _method(self, seed: int) -> Method:
        """The student before its first step: the keys and values (or rows) of the text's first tokens."""
        prompt = self.recipe.prompt
        p = prompt.virtual_tokens
        if p >= len(self.text_ids):
            raise ForewordError(
                f"{p} virtual tokens for a text of {len(self.text_ids)} save nothing",
                "key prompt.virtual_tokens",
                "lower prompt.virtual_tokens",
            )
        if find(prompt.method).kind == "prefix":
            values = self.teacher.values[:p].float()
        else:
            values = embedded(self.backbone, self.text_ids[:p])
        return build(Start(values.cpu()), prompt, torch.Generator().manual_seed(seed))

    def _layout(self, prompt: SoftPrompt, segments: Sequence[Segment], gradient: bool = False) -> Choice:
        plain = [replace(s, soft=()) for s in segments]
        return choose_layout(self.backbone, prompt, plain, gradient)

    def _outcome(self, prompt: SoftPrompt, held: Sequence[Example], layout: Choice) -> _Outcome:
        """What is said on held-out rows with a soft prompt."""
        placed = [replace(e, context=(*self._virtual(prompt), *e.context)) for e in held]
        if self.encoder.label_ids:
            outcome = run_rows(self.backbone, prompt, placed, self.encoder.label_ids, layout.score)
            assert outcome.probabilities is not None
            return _Outcome(list(outcome.probabilities.argmax(1)[:, None]), outcome)
        segments = [Segment(e.context, (e.target,)) for e in placed]
        found = candidates(self.backbone, prompt, segments, 1, layout.train)
        written = run_rows(self.backbone, prompt, placed, (), layout.score) if self.splits else None
        return _Outcome([c.ids[:, 0].numpy() for c in found], written)

    def _agreements(self, outcomes: Mapping[str, _Outcome]) -> dict[str, float]:
        """Share of held-out places where the teacher's likeliest class or token is said."""
        found = {}
        for name, outcome in list(outcomes.items())[1:]:
            shares = agreement(outcomes["full text"].said, outcome.said)
            low, high = interval(len(shares), partial(_mean, shares))
            say(self.console, f"agreement with the full text, {name}: {shares.mean():.3f} [{low:.3f}, {high:.3f}]")
            found[f"agreement ({name})"] = round(float(shares.mean()), 4)
        return found

    def _scores(self, outcomes: Mapping[str, _Outcome]) -> dict[str, Any]:
        """Scores on labelled held-out rows: the student's, with the teacher's and nobody's beside them."""
        assert self.splits is not None
        teacher, made, *_, plain = (o.outcome for o in outcomes.values())
        assert teacher is not None
        assert made is not None
        assert plain is not None
        classes = self.task.classes
        counts = label_counts(self.encoder.examples(self.splits.train), classes)
        scores = with_baselines(made, plain, counts, classes, self.splits.protocol)
        scores["baselines"]["full_text"] = scores_of(teacher, classes)
        return scores

    def _virtual(self, prompt: SoftPrompt) -> range:
        return range(self.backbone.vocab_size, self.backbone.vocab_size + prompt.virtual_ids)


def _mean(shares: Floats, rows: Any) -> float:
    return float(shares[rows].mean())
