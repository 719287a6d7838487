"""How segments share a forward pass: packed rows and right-padded rows, as index tensors.

A packed row is ``[opening][context 1][label words 1][context 2][label words 2]...``. Position ids
of every context restart after the opening, those of label words after their context. Branches
that begin with the same tokens share them: a segment is a tree (a trie over its branches), laid
out depth first, so one number a token says who sees it: token ``j`` is seen by ``i`` exactly if
``j <= i < end[j]``, where ``end[j]`` closes the subtree under ``j``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from foreword.records import Segment


@dataclass(frozen=True)
class Packed:
    """``R`` rows of ``N`` tokens each, and where in them ``M`` targets are predicted.

    Logits are wanted at ``U <= M`` places; several targets may be predicted at one (the first
    tokens of all classes after one context). Targets stand in the order row, segment, branch, token.
    """

    ids: torch.Tensor  # [R, N]
    keep: torch.Tensor  # [U]; places in the flattened [R * N]
    place: torch.Tensor  # [M]; which of the U places predicts a target
    targets: torch.Tensor  # [M]
    positions: torch.Tensor | None = None  # [R, N]; None: right-padded rows, which need neither
    end: torch.Tensor | None = None  # [R, N]; first index of the row that does not see the token
    cached: int = 0  # S; tokens of the opening that lie in a cache, seen by all

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


class _Row:
    """One packed row while it is written."""

    def __init__(self, opening: Sequence[int], cached: int) -> None:
        self.ids = list(opening)
        self.start = cached + len(opening)
        self.positions = list(range(cached, self.start))
        self.ends = [0] * len(opening)  # known once all is written
        self.keep: dict[int, int] = {}
        self.place: list[int] = []
        self.targets: list[int] = []

    def add(self, segment: Segment) -> None:
        """Writes a segment after what is there: its context, then its branches as a trie."""
        first = len(self.ids)
        self._feed(segment.context, self.start)
        found: dict[int, list[int]] = {}
        path: list[int] = []
        stack: list[int] = []
        below = self.start + len(segment.context)
        last = len(self.ids) - 1
        # Sorted, branches with a common beginning follow each other: the trie, depth first.
        for b in sorted(range(len(segment.branches)), key=lambda b: segment.branches[b][:-1]):
            fed = segment.branches[b][:-1]  # a branch's last token predicts nothing: never fed
            common = _common(path, fed)
            self._close(stack[common:])
            new = range(len(self.ids), len(self.ids) + len(fed) - common)
            self._feed(fed[common:], below + common)
            path, stack = list(fed), [*stack[:common], *new]
            found[b] = [last, *stack]
        self._close(stack)
        self._close(range(first, last + 1))
        for b, branch in enumerate(segment.branches):
            self.place += [self.keep.setdefault(at, len(self.keep)) for at in found[b]]
            self.targets += branch

    def _feed(self, ids: Sequence[int], position: int) -> None:
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.ends += [0] * len(ids)

    def _close(self, tokens: Sequence[int]) -> None:
        for at in tokens:
            self.ends[at] = len(self.ids)


def pack(rows: Sequence[tuple[Sequence[int], Sequence[Segment]]], cached: int = 0) -> Packed:
    """Lays segments out in packed rows, each after an opening of its own.

    Args:
        rows: for each row the ids in front of all its segments (soft prompt and the template's
            opening; empty when they lie in a cache) and its segments: contexts (without the
            opening, at least one token) and branches.
        cached: number of opening tokens in the cache, ``S``.
    """
    written = [_written(opening, segments, cached) for opening, segments in rows]
    width = max(len(row.ids) for row in written)
    keep: list[int] = []
    place: list[int] = []
    for r, row in enumerate(written):
        place += [len(keep) + p for p in row.place]
        keep += [r * width + at for at in row.keep]
    return Packed(
        _padded([row.ids for row in written], width), torch.tensor(keep), torch.tensor(place),
        torch.tensor([t for row in written for t in row.targets]),
        _padded([row.positions for row in written], width), _padded([row.ends for row in written], width), cached,
    )  # fmt: skip


def right_padded(rows: Sequence[tuple[Sequence[int], Sequence[Segment]]]) -> Packed:
    """The same targets by right-padded rows, one a branch; a causal model needs no mask for them."""
    texts = [(*opening, *s.context, *b[:-1]) for opening, segments in rows for s in segments for b in s.branches]
    branches = [b for _, segments in rows for s in segments for b in s.branches]
    width = max(map(len, texts))
    keep = [
        r * width + at
        for r, (text, branch) in enumerate(zip(texts, branches, strict=True))
        for at in range(len(text) - len(branch), len(text))
    ]
    targets = torch.tensor([t for b in branches for t in b])
    return Packed(_padded(texts, width), torch.tensor(keep), torch.arange(len(keep)), targets)


def left_pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as ids and mask ``[B, T]``, pads in front of everything."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids, mask


def visible(row: Packed, window: int | None = None) -> torch.Tensor:
    """Which key each query may see, boolean ``[R, N, S + N]``.

    Pads have an ``end`` of 0; each sees itself, so that no query sees nothing at all.

    Args:
        row: the packed rows.
        window: sliding window in positions (a key ``window`` or more behind is hidden).
    """
    assert row.end is not None
    assert row.positions is not None
    r, n = row.end.shape
    at = torch.arange(n, device=row.end.device)
    see = (at[:, None] >= at) & (at[:, None] < row.end[:, None, :])
    if row.cached:
        see = torch.cat([see.new_ones(r, n, row.cached), see], dim=2)
    if window is not None:
        cached = torch.arange(row.cached, device=row.end.device).expand(r, -1)
        keys = torch.cat([cached, row.positions], dim=1)
        see = see & (row.positions[:, :, None] - keys[:, None, :] < window)
    return see | (at[:, None] + row.cached == torch.arange(row.cached + n, device=row.end.device))


def additive(see: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as numbers added to attention scores ``[R, 1, N, S + N]``.

    Additive because eager attention adds whatever it is given: a boolean mask would be
    silently wrong there.
    """
    return torch.zeros(see.shape, dtype=dtype, device=see.device).masked_fill_(~see, torch.finfo(dtype).min)[:, None]


def block_mask(row: Packed, window: int | None = None) -> Any:
    """The same visibility for flex_attention, which skips blocks of 128 x 128 nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    assert row.end is not None
    assert row.positions is not None
    (r, n), s = row.end.shape, row.cached
    device = row.end.device
    end = torch.cat([row.end.new_full((r, s), n), row.end], dim=1)
    positions = row.positions
    keys = torch.cat([torch.arange(s, device=device).expand(r, -1), positions], dim=1)

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        seen = (k <= q + s) & (q < end[b, k])
        if window is not None:
            seen = seen & (positions[b, q] - keys[b, k] < window)
        return seen | (k == q + s)

    return create_block_mask(sees, r, None, n, s + n, device=str(device))


def _written(opening: Sequence[int], segments: Sequence[Segment], cached: int) -> _Row:
    row = _Row(opening, cached)
    for segment in segments:
        row.add(segment)
    row._close(range(len(opening)))
    return row


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _padded(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Rows as one tensor ``[R, width]``, zeros behind the shorter ones."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
