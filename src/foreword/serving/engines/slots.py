"""The soft prompts of a running model: which ids they have, who reads them, and what prefixes hold."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from foreword.backbone.load import Backbone
from foreword.serving.engine import EngineRefused, Rows, UnknownPrompt
from foreword.serving.engines.ids import Aliases, NoRoom, RowTable, Slot, TableHook


class Slots:
    """Holds soft prompts up to a number of bytes, and answers their ids at the model's embedding.

    Args:
        backbone: the model.
        budget: bytes of rows, and of prefixes.
    """

    def __init__(self, backbone: Backbone, budget: int) -> None:
        self.backbone, self.budget = backbone, budget
        hidden, dtype, device = backbone.hidden_size, backbone.dtype, backbone.device
        rows = max(budget // (hidden * torch.empty(0, dtype=dtype).element_size()), 1)
        self.rows = RowTable(backbone.vocab_size, torch.empty(rows, hidden, dtype=dtype, device=device))
        self.aliases = Aliases()
        self.hook = TableHook(backbone.embedding, self.rows, self.aliases)
        self.prefixes = False
        """Whether prefixes are taken; known once the loop is chosen."""
        self._slots: dict[str, Slot] = {}
        self._prefixes: dict[int, Slot] = {}  # by the id of their first row, read by the loop's thread
        self._places: list[tuple[torch.Tensor, torch.Tensor, Slot]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all soft prompts held."""
        return sum(s.nbytes for s in self._slots.values())

    def close(self) -> None:
        """Leaves the embedding as it was."""
        self.hook.remove()

    def holds(self, key: str) -> bool:
        """Whether there is a soft prompt of this key."""
        return key in self._slots

    def put(self, rows: Rows) -> None:
        """Takes a soft prompt in; refuses what does not fit."""
        self._check(rows)
        try:
            self._slots[rows.key] = self._taken(rows)
        except NoRoom as e:
            raise EngineRefused(f"no room for soft prompt {rows.key}: {e}; raise the memory of soft prompts") from None

    def _check(self, rows: Rows) -> None:
        if rows.kind == "prefix" and not self.prefixes:
            raise EngineRefused("soft prompts of kind prefix can't be served with this backbone")
        width = self.backbone.hidden_size if rows.kind == "rows" else self.backbone.geometry.width
        if rows.values.ndim != 2 or rows.values.shape[1] != width or not len(rows.values):
            raise EngineRefused(f"soft prompt {rows.key} has shape {rows.values.shape}, not [P, {width}]")
        if not np.isfinite(rows.values).all():
            raise EngineRefused(f"soft prompt {rows.key} has values that are not finite")

    def _taken(self, rows: Rows) -> Slot:
        values = torch.from_numpy(np.ascontiguousarray(rows.values))
        if rows.kind == "rows":
            return Slot(rows.key, self.rows.take(values), rows.values.nbytes)
        held = sum(s.nbytes for s in self._prefixes.values())
        if held + rows.values.nbytes > self.budget:
            raise NoRoom(f"{rows.values.nbytes} bytes beside {held} of {self.budget}")
        layers = self.backbone.geometry.layered(values.to(self.backbone.device, self.backbone.dtype)[None])
        ids = self.rows.take(torch.zeros(len(values), self.backbone.hidden_size))
        slot = Slot(rows.key, ids, rows.values.nbytes, tuple((k[0], v[0]) for k, v in layers))
        self._prefixes[ids[0]] = slot
        return slot

    def drop(self, key: str) -> None:
        """Gives rows back, once nobody reads them."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            slot.dropped = True
            self._free(slot)

    def read(self, slot: Slot | None) -> None:
        """A request begins to read a soft prompt."""
        if slot is not None:
            slot.readers += 1

    def leave(self, slot: Slot | None) -> None:
        """It is over."""
        if slot is not None:
            slot.readers -= 1
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        if slot.dropped and not slot.readers:
            self.rows.give_back(slot.ids)
            self._prefixes.pop(slot.ids[0], None)

    def resolve(self, key: str | None, local: tuple[int, ...]) -> tuple[Slot | None, tuple[int, ...]]:
        """A request's soft prompt, and its local ids as ids of the running model (without those of a prefix)."""
        base = self.rows.base
        if not local or min(local) < 0:
            raise EngineRefused("a request needs at least one token id, none of them negative")
        if key is None:
            if max(local) >= base:
                raise EngineRefused("virtual ids without a soft prompt")
            return None, local
        slot = self._slots.get(key)
        if slot is None:
            raise UnknownPrompt(f"soft prompt {key} is not loaded")
        count = 0 if slot.layers else len(slot.ids)
        if max(local) >= base + count:
            raise EngineRefused(f"soft prompt {key} has {count} rows to stand in the context")
        return slot, tuple(slot.ids[i - base] if i >= base else i for i in local)

    def leading(self, ids: tuple[int, ...]) -> int:
        """Virtual tokens in front, of which one text token at least stays apart."""
        count = sum(1 for _ in itertools.takewhile(lambda i: i >= self.rows.base, ids))
        return min(count, len(ids) - 1)

    def with_prefixes(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """New keys and values ``[1, heads, T, d]``, those of prefixes in place of what their ids gave."""
        if not self._prefixes:
            return key, value
        if layer == 0:
            self._places = self._found(self.hook.ids[0])
        for at, row, slot in self._places:
            k, v = slot.layers[layer]
            key[0, :, at], value[0, :, at] = k[:, row], v[:, row]
        return key, value

    def _found(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, Slot]]:
        """Where tokens of prefixes stand in this pass: places, which rows they are, whose."""
        present = set(ids[ids >= self.rows.base].tolist())
        if not present:
            return []
        found = []
        for slot in list(self._prefixes.values()):
            if not present.isdisjoint(slot.ids):
                own = torch.tensor(slot.ids, device=ids.device)
                at, row = (ids[:, None] == own).nonzero(as_tuple=True)
                found.append((at, row, slot))
        return found
