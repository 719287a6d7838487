"""Labelled rows as one text to read: few-shot examples, and what each of their tokens is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foreword.data.encode import Encoder
from foreword.data.template import Field
from foreword.errors import ForewordError
from foreword.records import Example, Row, Table

SEPARATOR = "\n"
INPUT_TEMPLATE, INPUT, OUTPUT_TEMPLATE, LABEL = 1, 2, 3, 4
"""Types of an example's tokens as PEFT's CPT numbers them; each further example adds 4."""


@dataclass(frozen=True)
class FewShot:
    """Examples one after the other: ``ids`` ``[N]``, their ``types`` where a method asks for them, and which rows."""

    ids: tuple[int, ...]
    types: tuple[int, ...]
    rows: tuple[int, ...]


def few_shot(encoder: Encoder, table: Table, examples: Sequence[Example], limit: int) -> FewShot:
    """Rows with their targets, the classes in turn, as many as fit ``limit`` tokens.

    Args:
        encoder: of the task; its virtual tokens are left out.
        table: the rows.
        examples: the same rows encoded, for their classes and targets.
        limit: most tokens; 0: one row of each class (of free text: the first).

    Raises:
        ForewordError: not even one row fits.
    """
    ids: list[int] = []
    types: list[int] = []
    chosen: list[int] = []
    classes = len({e.label for e in examples})
    for i in _in_turn(examples):
        if not limit and len(chosen) == classes:
            break
        found, kinds = _example(encoder, table.rows[i], examples[i].text, first=not chosen)
        if limit and len(ids) + len(found) > limit:
            continue
        ids += found
        types += [kind + 4 * len(chosen) for kind in kinds]
        chosen.append(i)
    if not chosen:
        raise ForewordError(f"no row fits {limit} tokens", table.origin, "raise prompt.virtual_tokens")
    return FewShot(tuple(ids), tuple(types), tuple(chosen))


def shown_in(encoder: Encoder, examples: Sequence[Example], tokens: int, seed: int) -> FewShot:
    """Rows with their targets, drawn by a seed, as many of each class: text of exactly ``tokens`` tokens.

    How many rows follows from their mean length alone, so that every seed leaves as many to train on; at most half of
    them. The text is cut at its beginning (but for what the tokenizer puts there), or read again where it is short.

    Args:
        encoder: of the task, without virtual tokens in its contexts.
        examples: the rows, encoded; at least two.
        tokens: length of the text.
        seed: of the draw.
    """
    lead: list[int] = list(encoder.tokenizer("")["input_ids"])
    end = list(encoder.tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"])
    texts = [[*e.context[len(lead) :], *e.target[:-1], *end] for e in examples]
    count = math.ceil(tokens * len(texts) / sum(map(len, texts)))
    count = max(1, min(count, len(texts) // 2))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(texts), generator=generator).tolist()
    chosen = [drawn[i] for i in _in_turn([examples[i] for i in drawn])[:count]]
    # In any order: from classes in a fixed turn a model learns the turn.
    rows = [chosen[i] for i in torch.randperm(count, generator=generator).tolist()]
    text = [token for i in rows for token in texts[i]]
    room = max(tokens - len(lead), 0)
    text *= math.ceil(room / len(text))
    ids = [*lead, *text[len(text) - room :]][:tokens]
    return FewShot(tuple(ids), (), tuple(rows))


def _in_turn(examples: Sequence[Example]) -> list[int]:
    """Indices, one of each class after the other."""
    by_class: dict[int | None, list[int]] = {}
    for i, example in enumerate(examples):
        by_class.setdefault(example.label, []).append(i)
    queues = [by_class[c] for c in sorted(by_class, key=lambda c: -1 if c is None else c)]
    longest = max(map(len, queues))
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _example(encoder: Encoder, row: Row, target: str, first: bool) -> tuple[list[int], list[int]]:
    """Ids of one example and their types, by where in the text each token begins."""
    spans = _spans(encoder, row, target)
    text = "".join(piece for piece, _ in spans)
    known = encoder.tokenizer(text, add_special_tokens=first, return_offsets_mapping=True)  # type: ignore[call-arg]
    ends, total = [], 0
    for piece, _ in spans:
        total += len(piece)
        ends.append(total)
    types = []
    for start, end in known["offset_mapping"]:
        # A token belongs where it ends: the space before a word is the word's.
        at = max(end - 1, start, 0)
        types.append(next((kind for (_, kind), stop in zip(spans, ends, strict=True) if at < stop), OUTPUT_TEMPLATE))
    return list(known["input_ids"]), types


def _spans(encoder: Encoder, row: Row, target: str) -> list[tuple[str, int]]:
    """The example's text in pieces, each with its type."""
    found: list[tuple[str, int]] = []
    parts = encoder.template.parts
    for i, part in enumerate(parts):
        if isinstance(part, Field):
            found.append((str(row[part.column]), INPUT))
        elif isinstance(part, str):
            last = i == len(parts) - 1
            found.append((part, OUTPUT_TEMPLATE if last else INPUT_TEMPLATE))
    found += [(encoder.task.separator + target, LABEL), (SEPARATOR, OUTPUT_TEMPLATE)]
    return [(piece, kind) for piece, kind in found if piece]
