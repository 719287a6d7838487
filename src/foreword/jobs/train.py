"""The main job: labelled rows in, a scored adapter folder out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from foreword.artifact.atomic import write_atomic
from foreword.artifact.folder import write_adapter
from foreword.artifact.lock import run_folder
from foreword.artifact.peft_types import peft_config, placed_config
from foreword.artifact.sidecar import Sidecar
from foreword.backbone.choose import Choice, choose_layout
from foreword.backbone.load import Backbone, choose_device, load_backbone
from foreword.checks import check, check_no_tune
from foreword.config import DistillConfig, PromptConfig, Recipe, members
from foreword.data.encode import Encoder
from foreword.data.raft import filled_in
from foreword.errors import ForewordError
from foreword.evaluation.evaluate import Outcome, label_counts, pooled, run_plain, run_rows, scores_of, with_baselines
from foreword.jobs.data import Splits, read_splits
from foreword.jobs.derive import backbone_facts
from foreword.jobs.fewshot import FewShot, few_shot
from foreword.jobs.prepare import Beginnings, beginnings, instruction, make_encoder, memory_explained, settle_tokens
from foreword.jobs.report import Scored, write_report
from foreword.jobs.training import Trained, say, train_in, validator
from foreword.parallel.world import ALONE, World, joined
from foreword.prompts.initialisers import parse_init
from foreword.prompts.methods.base import Method
from foreword.prompts.methods.cpt import label_targets
from foreword.prompts.methods.registry import METHODS, find, with_rates
from foreword.recipe import RECIPE, as_dict, load_recipe, to_yaml
from foreword.records import Example, Row, Segment
from foreword.report.card import model_card
from foreword.report.facts import Spread, Trial
from foreword.report.page import REPORT
from foreword.training.engine import choose_engine
from foreword.training.optim import build_optimizer, build_schedule
from foreword.training.progress import counting
from foreword.training.state import Population, State, make_plan
from foreword.versions import library_versions

MEMBERS = "members"
DATA_HASH = ".data.sha256"
MEMORY_KNOB = "lower train.token_budget or train.batch_size (raise train.accumulate), or model.dtype=bfloat16"
MAY_CHANGE = {
    "model.device", "train.checkpoint_every", "train.collective_minutes", "train.engine", "train.parallel",
    "train.recompute",
}  # fmt: skip
"""Keys that may differ when a run is resumed: they do not change its result on one device."""


def run(
    recipe: Recipe,
    out: Path,
    resume: bool = False,
    console: Console | None = None,
    rows: Sequence[Row] | None = None,
    eval_rows: Sequence[Row] | None = None,
) -> Backbone:
    """Trains, scores and writes a run; returns the backbone, for use with the new soft prompt.

    Args:
        recipe: all choices.
        out: the run folder; new or empty unless ``resume``.
        resume: go on with the run in ``out``, bit for bit on the CPU.
        console: where progress goes; None: nowhere.
        rows: training rows in memory, instead of ``recipe.data.path``.
        eval_rows: held-out rows in memory.
    """
    console = console or Console(quiet=True)
    recipe = replace(recipe, data=filled_in(recipe.data))
    check(recipe)
    check_no_tune(recipe)
    check_names(recipe)
    if recipe.distill != DistillConfig():
        raise ForewordError("distill keys mean nothing to train", "keys distill.*", "use foreword distill")
    splits = read_splits(recipe.data, rows, eval_rows)
    splits = replace(splits, task=replace(splits.task, placement=recipe.prompt.placement))
    with begun(recipe, splits.data_hash, out, resume) as (world, folder):
        job = _Job(recipe, splits, folder, console if world.first else Console(quiet=True), world)
        mark_started(recipe, splits.data_hash, folder)
        trained = job.train()
        job.write(trained, job.score(trained))
        job.report(trained)
    return replace(job.backbone, world=ALONE)


@contextmanager
def begun(recipe: Recipe, data_hash: str, out: Path, resume: bool) -> Iterator[tuple[World, Path]]:
    """A run's processes, and the folder that this one writes to and holds; a resumed run is the one begun there."""
    device, train = choose_device(recipe.model.device), recipe.train
    with (
        joined(train.parallel, device, train.collective_minutes) as world,
        world.folder(out) as folder,
        run_folder(folder, resume),
        memory_explained(MEMORY_KNOB),
    ):
        if resume:
            same_run(recipe, data_hash, folder)
        yield world, folder


def mark_started(recipe: Recipe, data_hash: str, out: Path) -> None:
    """Leaves in the run folder what a resumed run must have in common with this one."""
    if not (out / RECIPE).is_file():
        write_atomic(out / DATA_HASH, data_hash.encode())
        write_atomic(out / RECIPE, to_yaml(recipe).encode())  # last: it says that a run was started


class _Job:
    """What the stages of one run share: backbone, encoder, encoded rows and layout."""

    def __init__(self, recipe: Recipe, splits: Splits, out: Path, console: Console, world: World) -> None:
        self.recipe, self.splits, self.out, self.console = recipe, splits, out, console
        self.backbone: Backbone = load_backbone(recipe.model, world)
        self.few_shot: FewShot | None = None
        self.scored: Scored | None = None
        self.prompt = self._settle_prompt()
        kind = METHODS[self.prompt.method].kind
        self.encoder: Encoder = make_encoder(splits.task, self.backbone, self.prompt.virtual_tokens, kind)
        self.examples = self.encoder.examples(splits.train)
        self.validation = self.encoder.examples(splits.validation) if splits.validation else []
        self.held_out = self.encoder.examples(splits.held_out) if splits.held_out else []
        self.members = with_rates(members(recipe), recipe.prompt)
        self.methods, self.shown = self._beginnings(self.examples)
        self.layout: Choice = choose_layout(self.backbone, self.methods[0].soft_prompt(), self._layout_sample())
        self._introduce()

    def train(self) -> Trained:
        """The population on all training rows."""
        return self._train_on(self.out, self.examples, (self.methods, self.shown), "training")

    def score(self, trained: Trained) -> dict[str, Any]:
        """Held-out or cross-validated scores beside the baselines; empty without such rows."""
        if not self.splits.protocol:
            return {}
        task, label_ids, layout = self.splits.task, self.encoder.label_ids, self.layout.score
        if self.splits.folds:
            outcome = self._cross_validate()
            order = [i for _, out in self.splits.folds for i in out]
            rows, table = [self.examples[i] for i in order], self.splits.train.pick(order)
        else:
            assert self.splits.held_out is not None
            rows, table = self.held_out, self.splits.held_out
            with counting(self.console, "scoring", len(rows)) as progress:
                outcome = run_rows(self.backbone, trained.kept, rows, label_ids, layout, progress)
        self.scored = Scored(rows, table.rows, outcome, label_ids, trained_on=bool(self.splits.folds))
        with counting(self.console, "baseline", len(rows)) as progress:
            plain = run_plain(self.backbone, rows, label_ids, layout, progress)
        scores = with_baselines(outcome, plain, self._label_counts(), task.classes, self.splits.protocol)
        best = trained.population.best
        if self.members[best].init == "adapter":  # what going on from it brought
            start = self.methods[best].soft_prompt()
            before = run_rows(self.backbone, start.to(self.backbone.device), rows, label_ids, layout)
            scores["baselines"]["start"] = scores_of(before, task.classes)
        return scores

    def write(self, trained: Trained, scores: dict[str, Any]) -> None:
        """The adapter folder of the best member with sidecar and model card, and those of all members."""
        population = trained.population
        if len(self.members) > 1:
            self._introduce_members(population)
            for k, state in enumerate(population.states):
                self._write_adapter(self.out / MEMBERS / f"{k:02}", state, trained.figures, {})
        self._write_adapter(self.out, population.states[population.best], trained.figures, scores)

    def report(self, trained: Trained) -> None:
        """``report.html``; the run is whole before it."""
        population = trained.population
        start = self.methods[population.best].soft_prompt()
        with counting(self.console, REPORT, None):
            write_report(
                self.out, self.backbone, trained.kept, self.layout.score, start, self.scored,
                self._spread(population), population.best,
            )  # fmt: skip

    def _spread(self, population: Population) -> Spread:
        """The population's members, by what the best was chosen."""
        by, sign = self._merit
        trials: list[Trial] = [
            {"init": s.member.init, "lr": s.member.lr, "seed": s.member.seed, "method": self.prompt.method,
             "virtual_tokens": self.prompt.virtual_tokens, "score": sign * s.merit, "kept": k == population.best}
            for k, s in enumerate(population.states)
        ]  # fmt: skip
        return Spread(trials, by, lower=sign < 0)

    def _write_adapter(self, out: Path, state: State, figures: dict[str, Any], scores: dict[str, Any]) -> None:
        recipe, backbone, member, kept = self.recipe, self.backbone, state.member, state.kept
        init_text = (recipe.prompt.init_text or instruction(self.splits.task)) if member.init == "text" else None
        adapter = self._adapter_config(kept, init_text)
        sidecar = Sidecar(
            task=self.splits.task,
            backbone=backbone_facts(backbone),
            scores=scores,
            training=self._training_facts(state, init_text) | figures,
            versions=library_versions(),
        )
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "README.md", model_card(adapter, sidecar).encode())
        write_adapter(out, kept.stored(), adapter, sidecar)

    def _training_facts(self, state: State, init_text: str | None) -> dict[str, Any]:
        """What made this soft prompt, JSON-safe."""
        recipe, member, backbone = self.recipe, state.member, self.backbone
        return {
            "rows": len(self.examples), "label_counts": self._label_counts(), "data_sha256": self.splits.data_hash,
            "method": self.prompt.method, "trainable": sum(p.numel() for p in state.parameters), "seed": member.seed,
            "data_seed": recipe.data.seed, "init": member.init, "init_text": init_text, "lr": member.lr,
            "population": len(self.members), "layout": self.layout.train, "device": str(backbone.device),
            "dtype": str(backbone.dtype).removeprefix("torch."), "quantize": backbone.rounding,
        }  # fmt: skip

    def _adapter_config(self, kept: Method, init_text: str | None) -> dict[str, Any]:
        backbone, few = self.backbone, self.few_shot
        config = peft_config(
            kept.peft_type, kept.stored(), model_config=backbone.config, base=backbone.name,
            revision=backbone.revision, prompt=self.prompt, init_text=init_text,
            geometry=backbone.geometry if kept.kind == "prefix" else None,
            token_ids=few.ids if few else (), token_types=few.types if few else (),
        )  # fmt: skip
        return config if self.encoder.at_front else placed_config(config)

    def _cross_validate(self) -> Outcome:
        """Trains once a fold on the other rows and pools the held-out results."""
        outcomes = []
        for number, (keep, out) in enumerate(self.splits.folds, start=1):
            rows, folder = [self.examples[i] for i in keep], self.out / "folds" / str(number)
            kept = self._train_on(folder, rows, self._beginnings(rows), f"fold {number}").kept
            held = [self.examples[i] for i in out]
            outcomes.append(run_rows(self.backbone, kept, held, self.encoder.label_ids, self.layout.score))
        return pooled(outcomes)

    def _train_on(self, folder: Path, examples: Sequence[Example], begins: Beginnings, title: str) -> Trained:
        validate = None
        if self.validation and self.recipe.train.select != "last":
            validate = validator(self.backbone, self.validation, self.encoder.label_ids, self.layout)
        methods, shown = begins
        few, decay = self.few_shot, self.prompt.loss_decay
        # The row's own label is the last one and counts in full: those in the context decay from it.
        leads = [(at, t, w * decay) for at, t, w in label_targets(few.ids, few.types, decay)] if few else []
        return train_in(
            folder, self.backbone, methods, self.members, [e.segment for e in examples], self.recipe.train,
            self.layout, self.console, validate, title, leads, shown,
        )  # fmt: skip

    def _beginnings(self, examples: Sequence[Example]) -> Beginnings:
        """The members' soft prompts before the first step on these rows, and which of them these show."""
        task = self.splits.task
        return beginnings(self.prompt, task, self.encoder, self.backbone, self.members, examples, self.few_shot)

    def _settle_prompt(self) -> PromptConfig:
        """The prompt with its number of virtual tokens, and the rows it is made of (cpt)."""
        prompt, splits = self.recipe.prompt, self.splits
        if prompt.method != "cpt":
            return settle_tokens(prompt, splits.task, self.backbone)
        bare = make_encoder(splits.task, self.backbone, 0)
        limit = 0 if prompt.virtual_tokens == PromptConfig().virtual_tokens else prompt.virtual_tokens
        self.few_shot = few_shot(bare, splits.train, bare.examples(splits.train), limit)
        return replace(prompt, virtual_tokens=len(self.few_shot.ids))

    def _layout_sample(self) -> list[Segment]:
        """Rows as training and scoring will see them: all classes, or the own target."""
        return [Segment(e.context, self.encoder.label_ids or (e.target,)) for e in self.examples]

    def _label_counts(self) -> list[int]:
        return label_counts(self.examples, self.splits.task.classes)

    def _introduce(self) -> None:
        """Model, device, rows, layout and the guide's line of trainable parameters."""
        b, trainable = self.backbone, sum(p.numel() for m in self.methods for p in m.parameters() if p.requires_grad)
        total = b.parameters + trainable
        shown = max(map(len, self.shown), default=0)
        plan = make_plan(len(self.examples) - shown, self.recipe.train)
        kind = f"{len(self.splits.task.classes)} classes" if self.splits.task.classifies else "free text"
        p = self.prompt
        where = (
            ""
            if self.encoder.at_front
            else ", in the template"
            if self.encoder.template.soft_tokens
            else f", {p.placement}"
        )
        for line in (
            f"backbone {b.name} on {b.device}, {str(b.dtype).removeprefix('torch.')}",
            f"rows {len(self.examples)} to train, {len(self.validation)} to validate, "
            f"{len(self.held_out)} held out; {kind}; {plan.steps} steps",
            f"{p.method}, {p.virtual_tokens} virtual tokens{where}",
            f"layout {self.layout.train}: {self.layout.reason}",
            f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total}",
        ):
            say(self.console, line)

    def _introduce_members(self, population: Population) -> None:
        """What each member was and how it did, and by what the best was chosen."""
        by, sign = self._merit
        for k, state in enumerate(population.states):
            mark = " (kept)" if k == population.best else ""
            line = f"member {k:02} {state.member}: {by} {sign * state.merit:.4f}{mark}"
            say(self.console, line)

    @property
    def _merit(self) -> tuple[str, int]:
        """What members were compared by, and the sign that a merit takes to be that."""
        select = self.recipe.train.select
        if self.validation and select != "last":
            return f"validation {select}", -1 if select == "loss" else 1
        return "training loss of the last epoch", -1


def check_names(recipe: Recipe) -> None:
    """Optimiser, schedule, initialiser and engine by name, before the model is loaded."""
    choose_engine(recipe.train.engine, choose_device(recipe.model.device), 1, 1, 1, 1)
    for member in members(recipe):
        parse_init(member.init, recipe.prompt.virtual_tokens)
    find(recipe.prompt.method)
    probe = build_optimizer([torch.nn.Parameter(torch.zeros(1, 1))], recipe.train, 0.1)
    build_schedule(probe, recipe.train, 10)


def same_run(recipe: Recipe, data_hash: str, out: Path) -> None:
    """Refuses to resume with other choices or other rows than the run was started with."""
    if not (out / RECIPE).is_file():
        return  # nothing was started there yet
    before = as_dict(load_recipe(out / RECIPE))
    now = as_dict(recipe)
    changed = [
        f"{s}.{k} ({before[s][k]!r} -> {now[s][k]!r})"
        for s in now
        for k in now[s]
        if before[s][k] != now[s][k] and f"{s}.{k}" not in MAY_CHANGE
    ]
    if changed:
        raise ForewordError(
            f"--resume goes on with the same run, but these keys changed: {', '.join(changed)}",
            str(out / RECIPE),
            "leave them out (the run knows them), or give another --out",
        )
    if (out / DATA_HASH).read_text() != data_hash:
        raise ForewordError("the training rows are not those the run was started with", str(out), "give another --out")
