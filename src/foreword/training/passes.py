"""What a step reads: which rows share a forward pass, as index tensors.

The loss of a member is the mean over the target tokens of its own step's rows, however these are
split into passes, and whoever else is in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from foreword.backbone.choose import Layout
from foreword.backbone.forward import micro_batches
from foreword.backbone.layout import Packed, pack, right_padded, weighted
from foreword.parallel.world import ALONE, World
from foreword.records import Segment

Part = tuple[int, list[Segment]]
"""A member's place among those who train, and some of its rows."""


class Shape(NamedTuple):
    """Sizes of a pass: rows, tokens a row, targets."""

    rows: int
    width: int
    targets: int


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass. Padding has a count of 0."""

    row: Packed
    owner: torch.Tensor  # [U]; whose loss a place's targets belong to
    count: torch.Tensor  # [U]; targets of the owner's whole step
    members: torch.Tensor  # [R]; who a row belongs to

    def to(self, device: torch.device) -> Pass:
        """The same on a device."""
        return Pass(self.row.to(device), self.owner.to(device), self.count.to(device), self.members.to(device))

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        rows, width = self.row.ids.shape
        return Shape(rows, width, len(self.owner))

    def losses(self, logprobs: torch.Tensor, members: int) -> torch.Tensor:
        """Each member's share of its step's loss ``[K]``."""
        weight = torch.where(self.count > 0, 1.0 / self.count.clamp(min=1), 0.0)
        return torch.zeros(members, device=logprobs.device).index_add(0, self.owner, -logprobs * weight)


@dataclass(frozen=True)
class Reader:
    """How batches become passes.

    Args:
        opening: ids all segments begin with (mostly virtual tokens and the template's constant beginning).
        base: first virtual id; those of member ``k`` are moved by ``k * table``.
        table: rows of one member's table; 0 for prefixes.
        batch_size: most rows of a member in one pass.
        budget: most tokens of one pass.
        layout: how rows share it.
        cached: tokens of a prefix.
        leads: targets inside the opening, for every segment once: (place, target id, weight).
    """

    opening: tuple[int, ...]
    base: int
    table: int
    batch_size: int
    budget: int
    layout: Layout
    cached: int = 0
    leads: tuple[tuple[int, int, float], ...] = ()

    def parts(self, batches: Sequence[Sequence[Segment]]) -> Iterator[list[Part]]:
        """Which rows of which member share a pass: the i-th parts of all, as far as the budget goes."""
        lead = len(self.opening)
        split = [self._split(batch, lead) for batch in batches]
        for i in range(max(map(len, split))):
            together: list[Part] = []
            width = 0
            for k, mine in enumerate(split):
                if i >= len(mine):
                    continue
                tokens = lead + sum(s.tokens for s in mine[i])
                if together and max(width, tokens) * (len(together) + 1) > self.budget:
                    yield together
                    together, width = [], 0
                together.append((k, mine[i]))
                width = max(width, tokens)
            yield together

    def read(self, batches: Sequence[Sequence[Segment]], world: World = ALONE) -> list[Pass]:
        """The passes of one step: a batch of segments for each member who trains; of several processes its share.

        Where all run the backbone together each has as many passes as the others, the last ones idle.
        """
        counts = [sum(len(self.leads) + len(s.branches[0]) for s in batch) for batch in batches]
        passes = [self._pass(parts, counts) for parts in self.parts(_shares(batches, world, world.reader))]
        if world.layout.sharded:
            most = max(sum(1 for _ in self.parts(_shares(batches, world, r))) for r in range(world.layout.readers))
            idle = self._pass([(0, [batches[0][0]])], counts)
            idle = replace(idle, count=torch.zeros_like(idle.count))
            passes += [idle] * (most - len(passes))
        return passes

    def _split(self, batch: Sequence[Segment], lead: int) -> list[list[Segment]]:
        chunks = [batch[at : at + self.batch_size] for at in range(0, len(batch), self.batch_size)]
        return [[chunk[i] for i in part] for chunk in chunks for part in micro_batches(chunk, lead, self.budget)]

    def _pass(self, parts: Sequence[Part], counts: Sequence[int]) -> Pass:
        rows = [(self.opening, segments) for _, segments in parts]
        packed = self.layout == "packed"
        row = pack(rows, self.cached) if packed else right_padded(rows)
        members = torch.tensor([k for k, segments in parts for _ in range(1 if packed else len(segments))])
        row = replace(row, ids=row.ids + (row.ids >= self.base) * (members * self.table)[:, None])
        owner = [k for k, segments in parts for s in segments for _ in s.branches[0]]
        if self.leads or any(s.soft for _, segments in parts for s in segments):
            row = weighted(row, [s for _, segments in parts for s in segments], self._leads(parts, row))
            owner += [k for k, _ in parts for _ in self.leads]
        return Pass(row, torch.tensor(owner), torch.tensor([counts[k] for k in owner]), members)

    def _leads(self, parts: Sequence[Part], row: Packed) -> list[tuple[int, int, float]]:
        """The opening's targets, at each part's first copy of it, for all of the part's segments."""
        found = []
        first, width = 0, row.ids.shape[1]
        for _, segments in parts:
            found += [(first * width + at, target, weight * len(segments)) for at, target, weight in self.leads]
            first += 1 if self.layout == "packed" else len(segments)
        return found


def _shares(batches: Sequence[Sequence[Segment]], world: World, reader: int) -> list[Sequence[Segment]]:
    """What a reader has of each member's batch."""
    return [world.rows(batch, reader) for batch in batches]
