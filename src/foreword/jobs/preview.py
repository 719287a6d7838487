"""Exact token strings of some rows, and where the loss falls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foreword.backbone.load import end_token, load_tokenizer, window_of
from foreword.config import Recipe
from foreword.data.encode import Encoder
from foreword.jobs.data import Splits, read_splits
from foreword.jobs.prepare import room_for_text
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
    limit = room_for_text(window_of(config), recipe.prompt.virtual_tokens, recipe.model.id)
    end = end_token([tokenizer.eos_token_id, config.eos_token_id], recipe.model.id)
    encoder = Encoder(splits.task, tokenizer, limit, end)
    examples = encoder.examples(splits.train)
    lengths = [len(e.context) + len(e.target) for e in examples]

    def strings(ids: Sequence[int]) -> list[str]:
        return [tokenizer.decode([i]) for i in ids]

    return Preview(
        splits.task,
        [strings(ids) for ids in encoder.label_ids],
        [PreviewRow(e.number, strings(e.context), strings(e.target)) for e in examples[:count]],
        len(examples),
        max(lengths),
        sum(lengths) / len(lengths),
    )
