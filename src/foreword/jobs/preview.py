"""Exact token strings of some rows, and where the loss falls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from foreword.backbone.load import end_token, load_tokenizer, window_of
from foreword.config import Recipe
from foreword.data.encode import Encoder
from foreword.data.template import parse
from foreword.jobs.data import Splits, read_splits
from foreword.jobs.prepare import room_for_text
from foreword.prompts.methods.registry import find
from foreword.records import Row, Task


@dataclass(frozen=True)
class PreviewRow:
    """A row's token strings; the loss falls on ``target`` alone."""

    number: int
    context: list[str]
    target: list[str]


@dataclass(frozen=True)
class Preview:
    """What training would see: the task, its label words as tokens, some rows and the lengths."""

    task: Task
    label_tokens: list[list[str]]
    rows: list[PreviewRow]
    total: int
    longest: int
    mean: float


def preview(recipe: Recipe, count: int, rows: Sequence[Row] | None = None) -> Preview:
    """Encodes all training rows as a run would, and shows ``count`` of them. Loads no weights."""
    splits: Splits = read_splits(recipe.data, rows)
    tokenizer, config = load_tokenizer(recipe.model)
    end = end_token([tokenizer.eos_token_id, config.eos_token_id], recipe.model.id)
    task = replace(splits.task, placement=recipe.prompt.placement)
    tokens = parse(task.template).soft_tokens or recipe.prompt.virtual_tokens
    limit = room_for_text(window_of(config), tokens, recipe.model.id)
    virtual = range(-tokens, 0) if find(recipe.prompt.method).kind == "rows" else ()
    encoder = Encoder(task, tokenizer, limit, end, virtual)
    examples = encoder.examples(splits.train)
    lengths = [sum(i >= 0 for i in e.context) + len(e.target) for e in examples]

    def strings(ids: Sequence[int]) -> list[str]:
        """Token by token; neighbouring virtual tokens, whose ids are below 0 here, as one."""
        runs = [(soft, list(found)) for soft, found in itertools.groupby(ids, key=lambda i: i < 0)]
        return [
            s for soft, found in runs for s in (_soft(len(found)) if soft else [tokenizer.decode([i]) for i in found])
        ]

    return Preview(
        task,
        [strings(ids) for ids in encoder.label_ids],
        [PreviewRow(e.number, strings(e.context), strings(e.target)) for e in examples[:count]],
        len(examples),
        max(lengths),
        sum(lengths) / len(lengths),
    )


def _soft(tokens: int) -> list[str]:
    return [f"<{tokens} virtual tokens>"]
