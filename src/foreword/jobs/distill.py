"""A long text made into a few virtual tokens: the model that reads them learns from the model that reads the text.

Cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): start from the keys and values of the text's first
tokens, keep the first as an attention sink, and learn the teacher's own next-token probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from foreword.errors import ForewordError
from foreword.evaluation.agreement import agreement, candidates
from foreword.evaluation.evaluate import Outcome, run_rows, scores_of, with_baselines
from foreword.evaluation.metrics import interval
from foreword.evaluation.scoring import Floats, classify
from foreword.jobs.data import Splits, read_splits
from foreword.jobs.derive import write_derived
from foreword.jobs.fewshot import few_shot
from foreword.jobs.prepare import make_encoder, memory_explained
from foreword.jobs.study import Study, in_front, of_rows, read_text, self_study
from foreword.jobs.train import MEMORY_KNOB, mark_started, same_run
from foreword.jobs.training import say, train_in
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.methods.registry import build, find, with_rates
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Segment, Task

FREE_TASK = Task("{text}", "", "label")
"""Of a text without rows: whatever is asked after it."""


@dataclass(frozen=True)
class Contender:
    """Somebody who is compared with the teacher."""

    name: str
    prompt: SoftPrompt


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
    find(recipe.prompt.method)
    with run_folder(out, resume), memory_explained(MEMORY_KNOB):
        digest = splits.data_hash if splits else ""
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
        if room < 2:
            raise ForewordError(
                f"the text has {len(self.text_ids)} tokens, {self.backbone.name} reads {self.backbone.window}",
                recipe.distill.text or recipe.data.path,
                "give a shorter text",
            )
        self.encoder = make_encoder(self.task, self.backbone, len(self.text_ids), "prefix")
        self.teacher = reading(self.backbone, self.text_ids)
        say(console, f"teacher: {self.backbone.name} reading {len(self.text_ids)} tokens")

    def run(self, out: Path) -> None:
        """All stages; writes the folder."""
        study, eval_rows, layout = self._study()
        methods = [self._method(m.seed) for m in self.members]
        student = methods[0]
        virtual = range(self.backbone.vocab_size, self.backbone.vocab_size + student.soft_prompt().virtual_ids)
        own = self._layout(student.soft_prompt(), in_front(study.train, virtual), gradient=True)
        trained = train_in(
            out, self.backbone, methods, self.members, in_front(study.train, virtual), self.recipe.train,
            own, self.console, title="distilling",
        )  # fmt: skip
        best = trained.population.states[trained.population.best].kept
        start = Contender(f"its start ({student.soft_prompt().tokens} tokens)", student.soft_prompt())
        others = [start, Contender("no text", no_prompt(self.backbone))]
        figures = self._report(study, layout, Contender("distilled", best.soft_prompt()), others)
        scores = self._scores(best.soft_prompt(), eval_rows, own) if eval_rows else {}
        source = self.recipe.distill.text or f"{len(self.few_rows)} rows of {self.recipe.data.path}"
        facts = {
            "how": "distilled", "from": [source],
            "text_tokens": len(self.text_ids), "tokens_saved": len(self.text_ids) - best.soft_prompt().tokens,
            "method": self.recipe.prompt.method, **figures, **trained.figures,
        }  # fmt: skip
        write_derived(
            out, best.soft_prompt(), self.backbone, self.task, facts, scores, best.peft_type, self.recipe.prompt
        )
        say(self.console, f"tokens {len(self.text_ids)} -> {best.soft_prompt().tokens}")

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

    def _study(self) -> tuple[Study, list[Example], Choice]:
        """What is learnt and what is held out, with the teacher's targets."""
        config, seed = self.recipe.distill, self.members[0].seed
        if self.splits is None:
            pieces = [
                Segment(self.text_ids[:8], (self.text_ids[8:12],)),
                Segment(self.text_ids[4:9], (self.text_ids[9:12],)),
            ]
            layout = self._layout(self.teacher, pieces)
            say(self.console, f"self-study: {config.queries} openings, {config.answer_tokens} tokens after each")
            return self_study(self.backbone, self.teacher, self.text_ids, config, seed, layout.train), [], layout
        rows = [e for i, e in enumerate(self.encoder.examples(self.splits.train)) if i not in set(self.few_rows)]
        if not rows:
            raise ForewordError(
                "every row is an example of the text, and none is left to learn from",
                self.recipe.data.path,
                "lower distill.few_shot",
            )
        held = self.encoder.examples(self.splits.held_out) if self.splits.held_out else []
        layout = self._layout(self.teacher, [Segment(e.context, self.encoder.label_ids or (e.target,)) for e in rows])
        say(self.console, f"study: {len(rows)} rows, {len(held)} held out; their labels are not read")
        train = list(of_rows(self.backbone, self.teacher, rows, self.encoder, config, layout.score))
        fresh = held or rows
        return Study(train, [Segment(e.context, (e.target,)) for e in fresh]), held, layout

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
            with torch.no_grad():
                ids = torch.tensor(self.text_ids[:p], device=self.backbone.device)
                values = self.backbone.embedding(ids).float()
        return build(Start(values.cpu()), prompt, torch.Generator().manual_seed(seed))

    def _layout(self, prompt: SoftPrompt, segments: Sequence[Segment], gradient: bool = False) -> Choice:
        plain = [replace(s, soft=()) for s in segments]
        return choose_layout(self.backbone, prompt, plain, gradient)

    def _report(self, study: Study, layout: Choice, best: Contender, others: Sequence[Contender]) -> dict[str, Any]:
        """Agreement with the teacher on held-out rows: the same class, or the same likeliest token place by place."""
        teacher = self._said(self.teacher, study.held_out, layout)
        found: dict[str, Any] = {}
        for who in (best, *others):
            shares = agreement(teacher, self._said(who.prompt, study.held_out))
            low, high = interval(len(shares), partial(_mean, shares))
            say(self.console, f"agreement with the full text, {who.name}: {shares.mean():.3f} [{low:.3f}, {high:.3f}]")
            found[f"agreement ({who.name})"] = round(float(shares.mean()), 4)
        return found

    def _said(self, prompt: SoftPrompt, segments: Sequence[Segment], layout: Choice | None = None) -> list[Any]:
        """What is said after each context: ``[n]`` arrays of likeliest tokens, or of the one likeliest class."""
        virtual = range(self.backbone.vocab_size, self.backbone.vocab_size + prompt.virtual_ids)
        placed = in_front(segments, virtual)
        layout = layout or self._layout(prompt, placed)
        if label_ids := self.encoder.label_ids:
            table = classify(self.backbone, prompt, [s.context for s in placed], label_ids, layout.score)
            return list(table.argmax(1)[:, None])
        found = candidates(self.backbone, prompt, placed, 1, layout.train)
        return [c.ids[:, 0].numpy() for c in found]

    def _scores(self, best: SoftPrompt, held: Sequence[Example], own: Choice) -> dict[str, Any]:
        """Scores on labelled held-out rows: the student's, with the teacher's and nobody's beside them."""
        assert self.splits is not None

        def outcome(prompt: SoftPrompt) -> Outcome:
            virtual = range(self.backbone.vocab_size, self.backbone.vocab_size + prompt.virtual_ids)
            rows = [replace(e, context=(*virtual, *e.context)) for e in held]
            return run_rows(self.backbone, prompt, rows, self.encoder.label_ids, own.score)

        counts = [e.label for e in self.encoder.examples(self.splits.train)]
        classes = self.task.classes
        totals = [counts.count(c) for c in range(len(classes))]
        plain = outcome(no_prompt(self.backbone))
        scores = with_baselines(outcome(best), plain, totals, classes, self.splits.protocol)
        scores["baselines"]["full_text"] = scores_of(outcome(self.teacher), classes)
        return scores


def _mean(shares: Floats, rows: Any) -> float:
    return float(shares[rows].mean())
