"""Attention of a continuous batch, request by request, through torch's own SDPA.

transformers lays the keys of all requests end to end and hides the others' by a mask ``[tokens, all keys]``:
with 64 requests, 98 % of what is computed is thrown away (on 2 CPU cores that was more than the model
itself). Here requests that each have one new token are read side by side, padded to a common length, and
longer pieces one by one. The paged cache, its blocks and what is read from them stay transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

Replace = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""What a layer's new keys and values ``[1, heads, T, head_dim]`` become before they are written."""


@dataclass(frozen=True)
class Side:
    """Requests with one new token each, read side by side: ``R`` rows of up to ``L`` keys.

    ``queries`` ``[R]``: places of their tokens. ``keys``: where their ``R * L`` keys begin among those read.
    """

    queries: torch.Tensor
    keys: int
    length: int
    mask: torch.Tensor  # [R, 1, 1, L]; True where a key is the request's own


@dataclass(frozen=True)
class Piece:
    """A request with several new tokens: its queries and keys, and what each may see if some lie behind."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None  # [1, 1, q, k]; None: plain causal


@dataclass
class Step:
    """How one forward pass reads the cache. ``read``: places in the cache, in the order of the parts."""

    read: torch.Tensor
    sides: list[Side] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


def plan(queries: Sequence[int], keys: Sequence[int], read: torch.Tensor) -> Step:
    """Arranges a forward pass.

    Args:
        queries: cumulated numbers of new tokens ``[R + 1]``.
        keys: cumulated numbers of keys ``[R + 1]``, new ones included.
        read: places in the cache of all keys, request by request; empty when nothing lies there yet.
    """
    count = len(queries) - 1
    sizes = [(queries[i + 1] - queries[i], keys[i + 1] - keys[i]) for i in range(count)]
    if not len(read):
        pieces = [_piece(queries[i], queries[i], *sizes[i]) for i in range(count) if sizes[i][0]]
        return Step(read, [], pieces)
    step, parts, at = Step(read), [], 0
    for group in _by_length([i for i in range(count) if sizes[i][0] == 1], sizes):
        side, where = _side(group, queries, keys, sizes, at, read.device)
        step.sides.append(side)
        parts.append(read[where].flatten())
        at += where.numel()
    for i in (i for i in range(count) if sizes[i][0] > 1):
        step.pieces.append(_piece(queries[i], at, *sizes[i], device=read.device))
        parts.append(read[keys[i] : keys[i + 1]])
        at += sizes[i][1]
    step.read = torch.cat(parts)
    return step


def _by_length(singles: Sequence[int], sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Requests of like length together, so that padding at most doubles what is read."""
    groups: dict[int, list[int]] = {}
    for i in singles:
        groups.setdefault(max(sizes[i][1] - 1, 64).bit_length(), []).append(i)
    return list(groups.values())


def _side(
    group: Sequence[int], queries: Sequence[int], keys: Sequence[int], sizes: Sequence[tuple[int, int]], at: int,
    device: torch.device,
) -> tuple[Side, torch.Tensor]:  # fmt: skip
    lengths = torch.tensor([sizes[i][1] for i in group], device=device)
    starts = torch.tensor([keys[i] for i in group], device=device)
    longest = int(lengths.max())
    steps = torch.arange(longest, device=device)
    where = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
    mask = (steps < lengths[:, None])[:, None, None, :]
    places = torch.tensor([queries[i] for i in group], device=device)
    return Side(places, at, longest, mask), where


def _piece(query: int, key: int, new: int, seen: int, device: torch.device | None = None) -> Piece:
    mask = None
    if seen > new:
        mask = torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)[None, None]
    return Piece(slice(query, query + new), slice(key, key + seen), mask)


class PagedAttention:
    """The attention function, with the plan of the forward pass under way.

    Args:
        replace: see ``Replace``; asked in every layer before the cache is written.
    """

    def __init__(self, replace: Replace) -> None:
        self.replace = replace
        self._step = Step(torch.zeros(0))

    def install(self, model: Any) -> None:
        """Makes a model that uses SDPA use this; forward passes without a paged cache go to SDPA as before."""
        from transformers import AttentionInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

        name = f"foreword_paged_{id(self):x}"  # transformers keeps one table of names for all models
        AttentionInterface.register(name, self)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation(name)

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None, cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """As transformers calls it: ``query`` ``[1, heads, T, d]``; returns ``[1, T, heads, d]``."""
        if cache is None:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            out, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return out, None
        layer = module.layer_idx
        allocator = cache.layer_to_allocator[layer]
        if layer == 0:
            lengths = kwargs["cu_seq_lens_k"][allocator.layer_type]
            read = kwargs["read_index"][allocator.index]
            self._step = plan(kwargs["cu_seq_lens_q"].tolist(), lengths.tolist(), read)
        step = self._step
        reads = list(kwargs["read_index"])
        reads[allocator.index] = step.read
        key, value = self.replace(layer, key, value)
        keys, values = cache.update(
            key_states=key, value_states=value, layer_idx=layer, kwargs={**kwargs, "read_index": reads}
        )
        return attend(step, query, keys, values, scaling), None


def attend(
    step: Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """``[1, T, heads, d]`` of queries ``[1, heads, T, d]`` and what was read ``[1, kv heads, keys, d]``."""
    _, heads, tokens, width = query.shape
    shared = keys.shape[1]
    out = query.new_empty(1, tokens, heads, width)
    for side in step.sides:
        rows, length = len(side.queries), side.length
        part = slice(side.keys, side.keys + rows * length)
        k, v = (x[0, :, part].view(shared, rows, length, width).transpose(0, 1) for x in (keys, values))
        # Heads that share keys stand in the place of queries: nothing is repeated.
        q = query[0, :, side.queries].transpose(0, 1).reshape(rows, shared, heads // shared, width)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=side.mask, scale=scaling)
        out[0, side.queries] = found.reshape(rows, heads, width)
    for piece in step.pieces:
        q, k, v = query[:, :, piece.queries], keys[:, :, piece.keys], values[:, :, piece.keys]
        if heads != shared:
            k, v = (x.repeat_interleave(heads // shared, dim=1) for x in (k, v))
        causal = piece.mask is None and q.shape[2] > 1
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=piece.mask, is_causal=causal, scale=scaling)
        out[:, piece.queries] = found.transpose(1, 2)
    return out
