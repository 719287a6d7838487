"""Virtual token ids of many soft prompts in one running model.

A continuous batch takes token ids only, and shares cached keys and values between requests whose ids
agree. So ids must name content: an id is never given to another row while a block of the cache may
remember it. Rows live in a buffer of fixed capacity that is filled in place; the id of row ``r`` is
``V + use * capacity + r``, where ``use`` counts how often the row was given out, so a look-up is one
remainder. Above ``ALIASES`` stand other names of ids: a tenant's first token gets a name of its own, and
as every block's hash hangs on the one before, tenants share no blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ALIASES = 1 << 30
"""First alias; ids are int32 in transformers' continuous batching."""


@dataclass
class Slot:
    """A soft prompt in the table: the id of each of its rows, and how many requests read it.

    ``layers``: for a prefix, keys and values ``[heads, P, head_dim]`` of every layer; its rows then only lend
    their ids.
    """

    key: str
    ids: tuple[int, ...]
    nbytes: int
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    readers: int = 0
    dropped: bool = False


class NoRoom(Exception):
    """Too few free rows, or ids are used up until the cache has been cleared."""


@dataclass
class RowTable:
    """Rows ``[capacity, H]`` and who has which."""

    base: int
    table: torch.Tensor
    free: list[int] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)
    most_uses: int = 0

    def __post_init__(self) -> None:
        # Last in, first out: memory of rows never given out is never touched.
        self.free = list(range(self.capacity - 1, -1, -1))
        self.uses = [0] * self.capacity

    @property
    def capacity(self) -> int:
        """Rows in all."""
        return int(self.table.shape[0])

    def take(self, values: torch.Tensor) -> tuple[int, ...]:
        """Ids of new rows that hold ``values`` ``[P, H]``."""
        count = values.shape[0]
        if count > len(self.free):
            raise NoRoom(f"{count} rows asked for, {len(self.free)} of {self.capacity} free")
        rows = [self.free.pop() for _ in range(count)]
        self.table[rows] = values.to(self.table)
        return tuple(self.base + self.uses[r] * self.capacity + r for r in rows)

    def give_back(self, ids: tuple[int, ...]) -> None:
        """Frees rows; their ids are never given out again, until ``start_over``."""
        for i in reversed(ids):
            row = (i - self.base) % self.capacity
            self.uses[row] += 1
            self.most_uses = max(self.most_uses, self.uses[row])
            self.free.append(row)

    @property
    def worn(self) -> bool:
        """Whether the next use of a row might reach the aliases."""
        return self.base + (self.most_uses + 2) * self.capacity >= ALIASES

    def start_over(self) -> None:
        """Counts uses of free rows from 0 again: only once no cached block remembers their ids."""
        for row in self.free:
            self.uses[row] = 0
        self.most_uses = max(self.uses)


class Aliases:
    """Other names of ids, one for each pair of salt and id."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, int], int] = {}
        self._real = torch.zeros(1024, dtype=torch.long)

    def name(self, salt: str, real: int) -> int:
        """The alias of ``real`` for this salt; no salt, no alias."""
        if not salt:
            return real
        found = self._names.get((salt, real))
        if found is None:
            found = len(self._names)
            self._names[salt, real] = found
            if found >= len(self._real):
                self._real = torch.cat([self._real, torch.zeros_like(self._real)])
            self._real[found] = real
        return ALIASES + found

    def resolve(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids with every alias replaced by what it stands for."""
        named = ids >= ALIASES
        if not self._names or not bool(named.any()):
            return ids
        real = self._real.to(ids.device)[(ids - ALIASES).clamp(min=0).long()]
        return torch.where(named, real.to(ids.dtype), ids)


class TableHook:
    """Answers virtual ids at the input embedding from a row table, for as long as the engine lives."""

    def __init__(self, embedding: nn.Module, rows: RowTable, aliases: Aliases) -> None:
        self.rows, self.aliases = rows, aliases
        self.ids = torch.zeros(0)
        """Real ids ``[1, T]`` of the forward pass under way."""
        self._handles: list[Any] = [
            embedding.register_forward_pre_hook(self._remember),
            embedding.register_forward_hook(self._answer),
        ]

    def remove(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.ids = self.aliases.resolve(args[0])
        return (self.ids.masked_fill(self.ids >= self.rows.base, 0), *args[1:])

    def _answer(self, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        """``out`` is ``[B, T, H]``; rows of virtual ids are replaced, whatever scaling the module did."""
        virtual = self.ids >= self.rows.base
        if not bool(virtual.any()):
            return out
        at = (self.ids - self.rows.base).clamp(min=0) % self.rows.capacity
        return torch.where(virtual[..., None], F.embedding(at.long(), self.rows.table).to(out.dtype), out)
