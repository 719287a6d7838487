"""Multitask prompt tuning: one shared soft prompt and low-rank factors of each task, trained together.

Wang et al. 2023 (arXiv 2303.02861). A target task starts from the result with
``prompt.method=multitask prompt.init=adapter prompt.init_adapter=FOLDER``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from foreword.artifact.folder import write_adapter
from foreword.artifact.lock import run_folder
from foreword.artifact.peft_types import peft_config
from foreword.backbone.choose import Choice, choose_layout
from foreword.backbone.load import Backbone, load_backbone
from foreword.checks import check
from foreword.config import Recipe, members
from foreword.data.encode import Encoder
from foreword.data.template import parse
from foreword.errors import ForewordError
from foreword.evaluation.evaluate import label_counts, run_plain, run_rows, with_baselines
from foreword.jobs.data import Splits, read_splits
from foreword.jobs.derive import write_derived
from foreword.jobs.prepare import first_method, make_encoder, memory_explained, settle_tokens
from foreword.jobs.train import MEMORY_KNOB, check_names, mark_started, same_run
from foreword.jobs.training import say, train_in
from foreword.prompts.methods.base import Start
from foreword.prompts.methods.multitask import Multitask
from foreword.prompts.methods.registry import with_rates
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Segment

TASKS = "tasks"


@dataclass(frozen=True)
class _Task:
    """One task's rows, encoded with its own virtual ids."""

    name: str
    splits: Splits
    encoder: Encoder
    examples: list[Example]
    held_out: list[Example]

    @property
    def sample(self) -> list[Segment]:
        """Rows as scoring sees them."""
        return [Segment(e.context, self.encoder.label_ids or (e.target,)) for e in self.examples]


def multitask(recipes: Sequence[tuple[str, Recipe]], out: Path, resume: bool, console: Console | None = None) -> None:
    """Trains all tasks together and writes the shared adapter, and one ready adapter a task under ``tasks/``.

    Args:
        recipes: names and recipes of the tasks; model, prompt and train are those of the first.
        out: the run folder; new or empty unless ``resume``.
        resume: go on with the run in ``out``.
        console: where progress goes; None: nowhere.

    Raises:
        ForewordError: fewer than two tasks, other models, lists in the recipe, or tasks of one name.
    """
    console = console or Console(quiet=True)
    first = replace(recipes[0][1], prompt=replace(recipes[0][1].prompt, method="multitask"))
    _check(recipes, first)
    check_names(first)
    splits = [read_splits(recipe.data) for _, recipe in recipes]
    digest = hashlib.sha256(
        "".join(f"{n}{r.data}{s.data_hash}" for (n, r), s in zip(recipes, splits, strict=True)).encode()
    )
    with run_folder(out, resume), memory_explained(MEMORY_KNOB):
        if resume:
            same_run(first, digest.hexdigest(), out)
        backbone = load_backbone(first.model)
        names = [name for name, _ in recipes]
        prompt = settle_tokens(first.prompt, splits[0].task, backbone)
        tasks = [
            _encoded(n, s, backbone, prompt.virtual_tokens, t)
            for t, (n, s) in enumerate(zip(names, splits, strict=True))
        ]
        mark_started(first, digest.hexdigest(), out)
        _train(replace(first, prompt=prompt), tasks, backbone, out, console)


def _train(recipe: Recipe, tasks: Sequence[_Task], backbone: Backbone, out: Path, console: Console) -> None:
    prompt, task = recipe.prompt, tasks[0]
    (member,) = with_rates(members(recipe), prompt)
    plain = replace(prompt, method="prompt-tuning")
    rows = first_method(plain, task.splits.task, task.encoder, backbone, member, None)
    generator = torch.Generator().manual_seed(member.seed)
    method = Multitask(Start(rows().detach(), tasks=len(tasks)), prompt, generator)
    for task in tasks:
        say(console, f"task {task.name}: {len(task.examples)} rows to train, {len(task.held_out)} held out")
    layout = choose_layout(backbone, method.soft_prompt(), [s for task in tasks for s in _own(task)][:64])
    segments = [e.segment for task in tasks for e in task.examples]
    trained = train_in(out, backbone, [method], [member], segments, recipe.train, layout, console)
    kept = trained.population.states[0].kept
    values = kept().detach()
    for t, task in enumerate(tasks):
        mine = SoftPrompt(values[t * prompt.virtual_tokens : (t + 1) * prompt.virtual_tokens].clone())
        facts = {
            "how": "trained with other tasks",
            "from": [t.name for t in tasks if t is not task],
            "rows": len(task.examples),
            **trained.figures,
        }
        folder = out / TASKS / f"{t:02}-{task.name}"
        write_derived(
            folder, mine, backbone, task.splits.task, facts, _scores(task, backbone, kept.soft_prompt(), layout)
        )
        say(console, f"written {folder}")
    config = peft_config(
        kept.peft_type, kept.stored(), model_config=backbone.config, base=backbone.name, revision=backbone.revision,
        prompt=prompt,
    )  # fmt: skip
    write_adapter(out, kept.stored(), config, None)


def _own(task: _Task) -> list[Segment]:
    """Short rows of a task, each with its own target: one branch, as those of the other tasks."""
    return sorted((e.segment for e in task.examples), key=lambda s: s.tokens)[:2]


def _encoded(name: str, splits: Splits, backbone: Backbone, tokens: int, number: int) -> _Task:
    encoder = make_encoder(splits.task, backbone, tokens, first=number * tokens)
    held = encoder.examples(splits.held_out) if splits.held_out else []
    return _Task(name, splits, encoder, encoder.examples(splits.train), held)


def _scores(task: _Task, backbone: Backbone, prompt: SoftPrompt, layout: Choice) -> dict[str, object]:
    """Held-out scores of one task, beside its baselines; empty without such rows."""
    if not task.held_out:
        return {}
    label_ids = task.encoder.label_ids
    outcome = run_rows(backbone, prompt, task.held_out, label_ids, layout.score)
    plain = run_plain(backbone, task.held_out, label_ids, layout.score)
    classes = task.splits.task.classes
    return with_baselines(outcome, plain, label_counts(task.examples, classes), classes, task.splits.protocol)


def _check(recipes: Sequence[tuple[str, Recipe]], first: Recipe) -> None:
    if len(recipes) < 2:
        raise ForewordError("one task is no multitask training", "command line", "give two or more recipes")
    if len({name for name, _ in recipes}) < len(recipes):
        raise ForewordError("two tasks have the same name", "command line", "name the recipe files differently")
    if len(members(first)) > 1:
        raise ForewordError("several tasks make no population", recipes[0][0], "leave lists and prompt.population out")
    if first.prompt.placement != "front" or first.train.select != "last":
        where = "prompt.placement, train.select"
        raise ForewordError("several tasks stand at the front and are not selected", where, "leave both keys out")
    for name, recipe in recipes:
        check(recipe)
        if replace(recipe, data=recipes[0][1].data) != recipes[0][1]:
            raise ForewordError(
                "the tasks differ in model, prompt or train, which they share",
                f"{recipes[0][0]}, {name}",
                "let the recipes differ in data alone; keys on the command line go to all",
            )
        for key in ("folds", "validation_fraction"):
            if getattr(recipe.data, key):
                raise ForewordError(f"several tasks have no {key}", f"{name}, data.{key}", "data.eval_fraction=0.2")
        if recipe.data.template and parse(recipe.data.template).soft_tokens:
            raise ForewordError("several tasks stand at the front", f"{name}, data.template", "leave {soft:N} out")
