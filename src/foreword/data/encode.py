"""From rows to token ids: the context cut to fit, the target whole and tokenised in place."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from foreword.data.labels import class_indices, label_names, require_text
from foreword.data.template import Soft, parse, require_columns
from foreword.errors import ForewordError
from foreword.records import Example, Row, Table, Task


class Tokenizer(Protocol):
    """What encoding needs of a transformers tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        """Tokenises; the result's ``["input_ids"]`` is a list of ids."""


class Encoder:
    """Encodes rows of one task for one tokenizer.

    Args:
        task: template, separator, classes and label words.
        tokenizer: of the backbone.
        limit: most tokens of context and target together (the backbone's window less P).
        end_id: the end token every target is closed with; it is learnt.
        virtual: ids of the virtual tokens, in their order; empty where they lie in a cache.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, limit: int, end_id: int, virtual: Sequence[int] = ()) -> None:
        self.task, self.tokenizer, self.end_id, self.virtual = task, tokenizer, end_id, tuple(virtual)
        self.limit = min(limit, task.max_length) if task.max_length else limit
        self.template = parse(task.template)
        if self.virtual and self.template.soft_tokens not in (0, len(self.virtual)):
            placed, there = self.template.soft_tokens, len(self.virtual)
            raise ForewordError(
                f"the template places {placed} virtual tokens, the soft prompt has {there}",
                f"template {task.template!r}",
                "let the numbers in {soft:N} add up to it",
            )
        self.columns = tuple(f.column for f in self.template.fields)
        self.label_ids = tuple(self.target_ids(w) for w in task.words)
        """Token ids of each class's label words, end token included."""

    def context_ids(self, row: Row, room: int, number: int, origin: str) -> tuple[int, ...]:
        """Ids of the rendered context with its virtual tokens; the cut fields give way beyond ``room`` text tokens."""
        ids = self._placed(row)
        room += len(self.virtual)
        if len(ids) <= room:
            return ids
        low, high = 1, max(len(str(row[f.column])) for f in self.template.cuts)
        best: tuple[int, ...] | None = None
        while low <= high:  # the most characters that fit, by bisection
            kept = (low + high) // 2
            ids = self._placed(self.template.shorten(row, kept))
            if len(ids) <= room:
                best, low = ids, kept + 1
            else:
                high = kept - 1
        if best is None:
            raise ForewordError(
                f"row {number} does not fit: even with its text cut it takes more than {self.limit} tokens",
                origin,
                self._room_hint(),
            )
        return best

    def target_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a target tokenised in place, after the template's closing text, plus the end token."""
        head = self.template.closing
        before = self._raw(head)
        whole = self._raw(head + self.task.separator + text)
        in_place = whole[: len(before)] == before  # else a token spans the border: the target stands alone
        ids = whole[len(before) :] if in_place else self._raw(self.task.separator + text)
        if not ids:
            raise ForewordError(f"the target {text!r} has no tokens", f"template {self.task.template!r}", "give text")
        return (*ids, self.end_id)

    def contexts(self, table: Table) -> list[tuple[int, ...]]:
        """Context ids of all rows, leaving room for the longest label words."""
        require_columns(self.columns, table.columns, table.origin)
        require_text(table, self.columns)
        room = self.limit - max(map(len, self.label_ids), default=1)
        return [self.context_ids(r, room, n, table.origin) for r, n in zip(table.rows, table.numbers, strict=True)]

    def examples(self, table: Table) -> list[Example]:
        """All rows with their targets.

        Raises:
            ForewordError: a missing column, an empty value, an unknown class, or a row whose
                target cannot fit, each by row number, before anything is trained.
        """
        require_columns([self.task.label_column], table.columns, table.origin)
        names = label_names(table, self.task.label_column, self.task.names)
        if self.task.classifies:
            labels = class_indices(names, self.task.classes, table)
            return [
                Example(n, context, self.label_ids[y], y, self.task.words[y])
                for n, context, y in zip(table.numbers, self.contexts(table), labels, strict=True)
            ]
        require_columns(self.columns, table.columns, table.origin)
        require_text(table, self.columns)
        return [
            self._free_text(row, number, name, table.origin)
            for row, number, name in zip(table.rows, table.numbers, names, strict=True)
        ]

    def _free_text(self, row: Row, number: int, text: str, origin: str) -> Example:
        target = self.target_ids(text)
        room = self.limit - len(target)
        if room < 1:
            raise ForewordError(
                f"row {number} does not fit: its target has {len(target)} tokens of {self.limit}",
                origin,
                "shorten the target, or raise data.max_length",
            )
        return Example(number, self.context_ids(row, room, number, origin), target, None, text)

    def _room_hint(self) -> str:
        whole = [c for c in self.columns if c not in {f.column for f in self.template.cuts}]
        mark = f", or mark {{{whole[0]}|cut}} in the template too" if whole else ""
        return f"shorten the target or the template{mark}"

    def _placed(self, row: Row) -> tuple[int, ...]:
        """Ids of a row's context, virtual ids where the template or the task's placement puts them."""
        if not self.virtual or not self.template.soft_tokens:
            ids = self._ids(self.template.render(row))
            if self.task.placement == "end":
                return (*ids, *self.virtual)
            start = len(self.opening) if self.task.placement == "after-bos" else 0
            return (*ids[:start], *self.virtual, *ids[start:])
        found: list[int] = []
        rest, first = iter(self.virtual), True
        for piece in self.template.pieces(row):
            if isinstance(piece, Soft):
                found += itertools.islice(rest, piece.tokens)
            else:
                found += self._ids(piece) if first else self._raw(piece)
                first = False
        return tuple(found)

    @property
    def at_front(self) -> bool:
        """Whether the virtual tokens stand together in front of everything, which is all that PEFT knows."""
        if not self.virtual:
            return True
        if self.template.soft_tokens:
            return self.template.parts[0] == Soft(self.template.soft_tokens)
        return self.task.placement == "front" or (self.task.placement == "after-bos" and not self.opening)

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """What the tokenizer puts before every text (BOS); mostly nothing."""
        raw = self._raw("a")
        ids = self._ids("a")
        return ids[: len(ids) - len(raw)] if ids[len(ids) - len(raw) :] == raw else ()

    def _raw(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids(self, text: str) -> tuple[int, ...]:
        """Ids with the tokenizer's own opening (BOS) but never a closing token."""
        ids = tuple(self.tokenizer(text, add_special_tokens=True)["input_ids"])
        closing = self.tokenizer.eos_token_id
        if ids and ids[-1] == closing and self._raw(text)[-1:] != (closing,):
            ids = ids[:-1]
        return ids


def common_opening(contexts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest token prefix all contexts share, leaving each at least one token of its own.

    This is the template's constant opening, found in token space: a tokenizer may merge
    across the border between a literal and a field.
    """
    shortest = min(contexts, key=len)
    size = len(shortest) - 1
    for context in contexts:
        same = next((i for i in range(size) if context[i] != shortest[i]), size)
        size = min(size, same)
    return tuple(shortest[: max(size, 0)])


def rows_hash(table: Table, columns: Sequence[str]) -> str:
    """SHA-256 of the values in these columns: says which rows a score belongs to."""
    digest = hashlib.sha256()
    for row in table.rows:
        digest.update(json.dumps([str(row.get(c)) for c in columns], ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()
