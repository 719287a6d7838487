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
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foreword.records import Segment

Ints = NDArray[np.int64]


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
    cached: int = 0  # S; tokens before the row that lie in a cache, seen by all
    weights: torch.Tensor | None = None  # [M]; of targets, where a place has several that count together

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class _Tree:
    """One segment laid out by itself, counted from its own first token."""

    block: Ints  # [3, n]; ids, positions, ends
    keep: Ints  # [U]
    place: Ints  # [M]
    targets: Ints  # [M]


def pack(rows: Sequence[tuple[Sequence[int], Sequence[Segment]]], cached: int = 0) -> Packed:
    """Lays segments out in packed rows, each after an opening of its own.

    Args:
        rows: for each row the ids in front of all its segments (soft prompt and the template's
            opening; empty when they lie in a cache) and its segments: contexts (without the
            opening, at least one token) and branches.
        cached: number of opening tokens in the cache, ``S``.
    """
    trees = [[_laid_out(s) for s in segments] for _, segments in rows]
    sizes = [len(rows[r][0]) + sum(t.block.shape[1] for t in mine) for r, mine in enumerate(trees)]
    width = max(sizes)
    grid = np.zeros((3, len(rows), width), dtype=np.int64)
    nothing: Ints = np.zeros(0, dtype=np.int64)
    keep, place, targets, used = [nothing], [nothing], [nothing], 0
    for r, ((opening, _), mine) in enumerate(zip(rows, trees, strict=True)):
        at = len(opening)
        start = cached + at
        grid[0, r, :at], grid[1, r, :at], grid[2, r, :at] = opening, range(cached, start), sizes[r]
        for tree in mine:
            end = at + tree.block.shape[1]
            grid[:, r, at:end] = tree.block + np.array([[0], [start], [at]])
            keep.append(tree.keep + (r * width + at))
            place.append(tree.place + used)
            targets.append(tree.targets)
            at, used = end, used + len(tree.keep)
    ids, positions, ends = map(torch.from_numpy, grid)
    kept, places, wanted = (torch.from_numpy(np.concatenate(x)) for x in (keep, place, targets))
    return Packed(ids, kept, places, wanted, positions, ends, cached)


@lru_cache(maxsize=8192)  # a training set is laid out in every epoch
def _laid_out(segment: Segment) -> _Tree:
    """A segment's context, then its branches as a trie, depth first."""
    length = len(segment.context)
    ids, positions, ends = list(segment.context), list(range(length)), [0] * length
    found: dict[int, list[int]] = {}
    path: Sequence[int] = ()
    stack: list[int] = []

    def close(tokens: Sequence[int]) -> None:
        for at in tokens:
            ends[at] = len(ids)

    # Sorted, branches with a common beginning follow each other.
    for b in sorted(range(len(segment.branches)), key=lambda b: segment.branches[b][:-1]):
        fed = segment.branches[b][:-1]  # a branch's last token predicts nothing: never fed
        common = _common(path, fed)
        close(stack[common:])
        stack = [*stack[:common], *range(len(ids), len(ids) + len(fed) - common)]
        ids += fed[common:]
        positions += range(length + common, length + len(fed))
        ends += [0] * (len(fed) - common)
        path, found[b] = fed, [length - 1, *stack]
    close(stack)
    close(range(length))
    keep: dict[int, int] = {}
    place = [keep.setdefault(at, len(keep)) for b in range(len(segment.branches)) for at in found[b]]
    targets = [t for branch in segment.branches for t in branch]
    block, *lists = (np.array(x, dtype=np.int64) for x in ([ids, positions, ends], list(keep), place, targets))
    return _Tree(block, *lists)


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


def weighted(row: Packed, segments: Sequence[Segment], leads: Sequence[tuple[int, int, float]] = ()) -> Packed:
    """The same rows with weighted targets: soft ones of segments, and ``leads`` of what stands before them.

    Args:
        row: packed or right-padded rows of segments with one branch each.
        segments: those segments, in their order.
        leads: (place in the flattened rows, target id, weight); they come last.
    """
    plain = ((((t,), (1.0,)) for t in s.branches[0]) if not s.soft else s.soft for s in segments)
    wanted = [candidates for found in plain for candidates in found]
    wanted += [((token,), (weight,)) for _, token, weight in leads]
    place = [i for i, (ids, _) in enumerate(wanted) for _ in ids]
    return replace(
        row,
        keep=torch.cat([row.keep[row.place], torch.tensor([at for at, _, _ in leads], dtype=torch.long)]),
        place=torch.tensor(place),
        targets=torch.tensor([t for ids, _ in wanted for t in ids]),
        weights=torch.tensor([w for _, weights in wanted for w in weights]),
    )


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


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _padded(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Rows as one tensor ``[R, width]``, zeros behind the shorter ones."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
