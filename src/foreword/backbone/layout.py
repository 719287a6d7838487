"""The packed row: many segments after one shared opening, in a single pass.

``[shared opening][context 1][branch 1a][branch 1b]...[context 2][branch 2a]...``

Position ids of every context restart after the opening, those of every branch after its
context. A token sees the opening, its own context and its own branch, so the row's results
are those of each (opening, context, branch) read alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foreword.records import Segment

OPENING = -1


@dataclass(frozen=True)
class Packed:
    """One packed row of ``N`` tokens, of which the opening may lie in a cache of ``S`` tokens.

    ``keep[m]`` is the position whose logits predict ``targets[m]``; the targets stand in the
    order segment, branch, token.
    """

    ids: torch.Tensor  # [N]
    positions: torch.Tensor  # [N]
    segment: torch.Tensor  # [N]; OPENING for the opening
    branch: torch.Tensor  # [N]; 0 for a context
    keep: torch.Tensor  # [M]
    targets: torch.Tensor  # [M]
    cached: int = 0  # S


def pack(opening: Sequence[int], segments: Sequence[Segment], cached: int = 0) -> Packed:
    """Lays segments out in one row.

    Args:
        opening: ids in front of all segments (soft prompt and the template's opening); empty
            when they lie in a cache.
        segments: contexts (without the opening, at least one token) and branches.
        cached: number of opening tokens in the cache, ``S``.
    """
    ids = list(opening)
    start = cached + len(opening)
    positions = list(range(cached, start))
    segment = [OPENING] * len(opening)
    branch = [0] * len(opening)
    keep: list[int] = []
    targets: list[int] = []
    for s, seg in enumerate(segments):
        ids += seg.context
        end = start + len(seg.context)
        positions += range(start, end)
        segment += [s] * len(seg.context)
        branch += [0] * len(seg.context)
        last = len(ids) - 1
        for b, tokens in enumerate(seg.branches, start=1):
            # A branch's last token predicts nothing, so it is never fed.
            fed = tokens[:-1]
            keep += [last, *range(len(ids), len(ids) + len(fed))]
            targets += tokens
            ids += fed
            positions += range(end, end + len(fed))
            segment += [s] * len(fed)
            branch += [b] * len(fed)
    as_tensor = torch.tensor
    return Packed(
        as_tensor(ids), as_tensor(positions), as_tensor(segment), as_tensor(branch),
        as_tensor(keep), as_tensor(targets), cached,
    )  # fmt: skip


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
    """Which key each query may see, boolean ``[N, S + N]``.

    Args:
        row: the packed row.
        window: sliding window in positions (a key ``window`` or more behind is hidden).
    """
    n, s = len(row.ids), row.cached
    same_segment = (row.segment[None, :] == row.segment[:, None]) | (row.segment[None, :] == OPENING)
    same_branch = (row.branch[None, :] == 0) | (row.branch[None, :] == row.branch[:, None])
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    see = causal & same_segment & same_branch
    see = torch.cat([torch.ones(n, s, dtype=torch.bool), see], dim=1)
    if window is not None:
        keys = torch.cat([torch.arange(s), row.positions])
        see &= row.positions[:, None] - keys[None, :] < window
    return see


def additive(see: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as numbers added to attention scores ``[1, 1, N, S + N]``.

    Additive because eager attention adds whatever it is given: a boolean mask would be
    silently wrong there.
    """
    return torch.zeros(see.shape, dtype=dtype).masked_fill_(~see, torch.finfo(dtype).min)[None, None]
