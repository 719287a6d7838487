"""From texts, rows and chats to local ids, and from ids back to text as it comes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from foreword.backbone.load import load_tokenizer
from foreword.config import ModelConfig
from foreword.data.encode import Encoder
from foreword.data.sources import rows_table
from foreword.errors import ForewordError
from foreword.prompts.soft import Kind
from foreword.records import Row, Task
from foreword.serving.engine import Capabilities

Message = Mapping[str, Any]
ORIGIN = "the request"
UNKNOWN_BYTES = "\ufffd"
HELD = 16
"""Tokens without a whole character after which the settled ones are let go (a character has four bytes at most)."""


class TextStream:
    """Ids to text, piece by piece. Special tokens are left out; a character comes whole or not yet.

    The pieces together are ``tokenizer.decode(ids, skip_special_tokens=True)``; where a tokenizer falls back to
    bytes, for all ids that a text has. (``tokenizers.decoders.DecodeStream`` raises on others.)
    """

    __slots__ = ("_decode", "_held", "_said", "_special")

    def __init__(self, tokenizer: Any, special: frozenset[int]) -> None:
        self._decode, self._special = tokenizer.decode, special
        self._said: list[int] = []
        """The tokens of the last piece: how a token reads depends on what stands before it."""
        self._held: list[int] = []

    def step(self, token_id: int) -> str:
        """The text this token brings; empty while the bytes of a character are incomplete."""
        if token_id in self._special:
            return ""
        self._held.append(token_id)
        text = self._text()
        if text.endswith(UNKNOWN_BYTES):
            return self._settled() if len(self._held) > HELD else ""
        if text:
            self._said, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What is left when no more tokens come: bytes that never became a character, as U+FFFD."""
        text = self._text()
        self._said, self._held = [], []
        return text

    def _text(self) -> str:
        """The text of the held tokens, after that of the last piece."""
        before = self._decode(self._said)
        together: str = self._decode(self._said + self._held)
        return together[len(before) :]

    def _settled(self) -> str:
        """Lets go of the held tokens that what comes can no longer change: those before the last character's."""
        whole, ids = self._decode(self._held), self._held
        for at in range(len(ids) - 1, len(ids) - 5, -1):
            if self._decode(ids[:at]) + self._decode(ids[at:]) == whole:
                text = self._text()
                rest = self._decode(ids[at:])
                self._said, self._held = [], ids[at:]
                return text.removesuffix(rest)
        return ""


@dataclass(frozen=True)
class Base:
    """What the gateway knows of the plain model without holding it.

    Several threads may read texts at once; readers are made in one.
    """

    name: str
    tokenizer: Any
    capabilities: Capabilities
    _readers: WeakValueDictionary[Any, Reader] = field(default_factory=WeakValueDictionary, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.tokenizer("a")  # the first text switches truncation off, which would fail beside another thread's text

    def raw_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text with the tokenizer's opening (BOS), never a closing end token."""
        return self.reader(None).raw(text)

    def chat_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a chat in the model's own template, ready for the assistant's answer.

        Raises:
            ForewordError: it has no chat template, or the template refuses these messages.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise ForewordError("the model has no chat template", self.name, "use completions")
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, return_dict=False
            )
        except Exception as e:  # a template is its maker's program and raises what it likes
            first = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            raise ForewordError(
                f"the model's chat template refuses these messages: {first}",
                ORIGIN,
                "give user and assistant turns by turns, each with a text",
            ) from None
        return tuple(ids)

    def decoder(self) -> TextStream:
        """A new stream of text."""
        return TextStream(self.tokenizer, self._special)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset({i for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids))

    def reader(self, task: Task | None, tokens: int = 0, kind: Kind = "rows") -> Reader:
        """The reader of a task for ``tokens`` virtual tokens (0: the plain model); equal ones are one object.

        Raises:
            ForewordError: a template that does not fit the soft prompt, or label words without tokens.
        """
        key = (task, tokens, kind)
        found = self._readers.get(key)
        if found is None:
            found = self._readers[key] = Reader(self, task, tokens, kind)
        return found


async def open_base(model: str, capabilities: Capabilities, name: str = "", revision: str | None = None) -> Base:
    """Tokenizer of a model, without its weights.

    Args:
        model: hub id or folder.
        capabilities: of the engine that runs it.
        name: clients' name for it; empty: the hub id, or the folder's name.
        revision: of the hub model.
    """
    tokenizer, _ = await asyncio.to_thread(load_tokenizer, ModelConfig(model, revision))
    path = Path(model).expanduser()
    return Base(name or (path.resolve().name if path.exists() else model), tokenizer, capabilities)


class Reader:
    """Reads texts, rows and chats for soft prompts of one task and size: local ids, virtual ones included.

    ``task``: None for an adapter without a sidecar, which reads a text as it is. ``label_ids``: of each class's
    label words, end token included. ``classes``: their names, in the same order. ``columns``: of the template.
    """

    __slots__ = ("__weakref__", "_base", "_encoder", "_plain", "_raw", "_virtual", "task")

    def __init__(self, base: Base, task: Task | None, tokens: int, kind: Kind) -> None:
        known = base.capabilities
        self.task, self._base = task, base
        self._virtual = range(known.vocab_size, known.vocab_size + tokens) if kind == "rows" else range(0)
        raw = Task("{text}", " ", "label", placement=task.placement if task else "front")
        limit = known.window - tokens
        self._raw, self._encoder = (
            Encoder(t, base.tokenizer, limit, known.end_id, self._virtual) for t in (raw, task or raw)
        )
        self._plain: Reader | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none where it writes free text."""
        return self.task.classes if self.task else ()

    @property
    def label_ids(self) -> tuple[tuple[int, ...], ...]:
        """Ids of each class's label words, end token included."""
        return self._encoder.label_ids

    @property
    def biases(self) -> tuple[float, ...]:
        """Of the classes, in nats; empty: none."""
        return self.task.biases if self.task else ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the template reads."""
        return self._encoder.columns

    def raw(self, text: str) -> tuple[int, ...]:
        """A text as it is, with the virtual tokens where the task's placement says.

        Raises:
            ForewordError: the template itself places them, or there is nothing to read.
        """
        self._refuse_placed()
        return self._checked(self._raw.context_ids({"text": text}, sys.maxsize >> 1, 1, ORIGIN))

    def row(self, row: Row | str) -> tuple[int, ...]:
        """A row through the template, cut where it must give way; a text fills the only column.

        Raises:
            ForewordError: a missing or empty column, or a row that cannot fit.
        """
        if isinstance(row, str):
            row = {self._only_column(): row}
        (ids,) = self._encoder.contexts(rows_table([row], ORIGIN))
        return self._checked(ids)

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A chat: one user turn goes through a one-column template, all else through the model's chat template."""
        turn = messages[0] if len(messages) == 1 else {}
        text = turn.get("content")
        if self.task and len(self.columns) == 1 and turn.get("role") == "user" and isinstance(text, str):
            return self.row(text)
        self._refuse_placed()
        return self._checked(self._amid(self._base.chat_ids(messages)))

    def plain(self) -> Reader:
        """The same template and label words for the plain model, without virtual tokens."""
        if self._plain is None:
            task = replace(self.task, biases=()) if self.task else None  # they are the soft prompt's
            self._plain = self._base.reader(task)
        return self._plain

    def _only_column(self) -> str:
        if len(self.columns) != 1:
            raise ForewordError(
                f"the template has {len(self.columns)} columns", ORIGIN, f"give an object of {list(self.columns)}"
            )
        return self.columns[0]

    def _refuse_placed(self) -> None:
        if self._virtual and self._encoder.template.soft_tokens:
            raise ForewordError(
                "this soft prompt's virtual tokens stand at places within its template, which a text as it is lacks",
                ORIGIN,
                f"give its columns: {list(self.columns)}",
            )

    def _amid(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The virtual tokens put to other ids as ``Encoder`` puts them to a row's."""
        placement = self._raw.task.placement
        if placement == "end":
            return (*ids, *self._virtual)
        opening = self._raw.opening if placement == "after-bos" else ()
        start = len(opening) if ids[: len(opening)] == opening else 0
        return (*ids[:start], *self._virtual, *ids[start:])

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Refuses nothing to read, and tokens that the model has no row for: they would pass for virtual ones."""
        if not ids:
            raise ForewordError("there is nothing to read", ORIGIN, "give a text")
        first = self._base.capabilities.vocab_size
        if sum(i >= first for i in ids) != len(self._virtual):
            raise ForewordError(
                "the text holds a token that the tokenizer knows and the model does not",
                ORIGIN,
                "leave special tokens out of the text",
            )
        return ids
