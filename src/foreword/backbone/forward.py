"""Log-probabilities of branches after their contexts, in one of three exact layouts.

- ``packed``: all segments in one row after one shared opening (``layout.py``). No padding,
  no copies of the soft prompt, the LM head only where a target is predicted.
- ``shared``: contexts left-padded in front of the soft prompt, their KV repeated for each
  branch. For models that build position biases from a 2-D mask (ALiBi); scoring only.
- ``rows``: one right-padded row a branch and no mask, which a causal model does not need.
  Exact for every causal model, recurrent ones too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from foreword.backbone.head import HeadTap, place_logprobs, target_logprobs, top_at
from foreword.backbone.kv import cache_of, lasting_cache
from foreword.backbone.layout import Packed, additive, block_mask, left_pad, pack, right_padded, visible
from foreword.backbone.load import Backbone
from foreword.records import Segment

Rows = Sequence[tuple[Sequence[int], Sequence[Segment]]]
"""Openings (ids that segments share), each with the segments that stand after it."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values ``[B, heads, S, head_dim]`` of what stands before the input, layer by layer.

    ``B`` is 1 (the same for all rows) or the number of rows.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    size: int

    def cache(self, rows: int, keep: bool = False) -> Any:
        """A cache of ``rows`` rows that begins with it; with ``keep`` a forward pass appends to it."""
        layers = [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in self.layers]
        return cache_of(layers) if keep else lasting_cache(layers)


def packed_logprobs(backbone: Backbone, rows: Rows, prefix: Prefix | None = None) -> torch.Tensor:
    """Log-probability of every branch token, ``[M]`` in the order row, segment, branch, token.

    Args:
        backbone: the model, with virtual ids attached when an opening holds some.
        rows: openings, each with segments whose contexts leave it out.
        prefix: keys and values of what stands before the openings.
    """
    return run(backbone, pack(rows, prefix.size if prefix else 0), prefix)


def rows_logprobs(backbone: Backbone, rows: Rows, prefix: Prefix | None = None) -> torch.Tensor:
    """The same as ``packed_logprobs`` by right-padded rows, one a branch, without any mask."""
    return run(backbone, right_padded(rows), prefix)


def shared_logprobs(backbone: Backbone, rows: Rows, prefix: Prefix | None = None) -> torch.Tensor:
    """The same with each context read once: ``[prefix][pads][opening][context]``, then its branches.

    Every segment must have the same number of branches.
    """
    segments = [s for _, found in rows for s in found]
    device, count = backbone.device, len(segments[0].branches)
    ids, mask = left_pad([(*opening, *s.context) for opening, found in rows for s in found])
    cache = prefix.cache(len(ids), keep=True) if prefix else None
    if prefix:
        mask = torch.cat([mask.new_ones(len(ids), prefix.size), mask], dim=1)
    first = _run_padded(backbone, ids, mask, cache, last=True)
    branches = [b for s in segments for b in s.branches]
    tail = max(map(len, branches)) - 1
    logits = first.logits[:, -1:].repeat_interleave(count, dim=0)
    if tail:
        fed = torch.zeros(len(branches), tail, dtype=torch.long)
        for i, branch in enumerate(branches):
            fed[i, : len(branch) - 1] = torch.tensor(branch[:-1])
        first.past_key_values.batch_repeat_interleave(count)
        mask = torch.cat([mask.repeat_interleave(count, dim=0), torch.ones_like(fed)], dim=1)
        rest = _run_padded(backbone, fed, mask, first.past_key_values)
        logits = torch.cat([logits, rest.logits], dim=1)
    flat = torch.cat([logits[i, : len(b)] for i, b in enumerate(branches)])
    targets = torch.tensor([t for b in branches for t in b], device=device)
    return _gathered(flat, targets)


def compute_prefix(backbone: Backbone, opening: Sequence[int], before: Prefix | None = None) -> Prefix:
    """Reads the opening once, after what stands before it, and keeps all keys and values."""
    from transformers import DynamicCache

    # Without a config every layer of the cache is a full one: our own masks do the windows.
    cache = before.cache(1, keep=True) if before else DynamicCache()
    ids = torch.tensor([list(opening)], device=backbone.device)  # one plain row: no mask is needed
    tap = HeadTap(backbone.model.get_output_embeddings()) if backbone.knows_head else nullcontext()
    with tap:
        backbone.model(input_ids=ids, past_key_values=cache, use_cache=True)
    size = len(opening) + (before.size if before else 0)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), size)


def run(backbone: Backbone, row: Packed, prefix: Prefix | None = None) -> torch.Tensor:
    """Log-probabilities of packed or right-padded rows: ``[M]`` of the targets.

    Where targets have weights it is ``[U]``: at each place their weighted sum.
    """
    row = row.to(backbone.device)
    cache: dict[str, Any] = {"past_key_values": prefix.cache(len(row.ids))} if prefix else {}
    if not backbone.knows_head:
        found = _gathered(_kept_logits(backbone, row, use_cache=bool(prefix), **cache)[row.place], row.targets)
        if row.weights is None:
            return found
        return found.new_zeros(len(row.keep)).index_add(0, row.place, found * row.weights)
    with HeadTap(backbone.model.get_output_embeddings()) as tap:
        _forward(backbone, row, use_cache=bool(prefix), **cache)
    if row.weights is not None:
        return place_logprobs(backbone, tap.at(row.keep), row.place, row.targets, row.weights)
    return target_logprobs(backbone, tap.at(row.keep), row.place, row.targets)


def top_tokens(backbone: Backbone, row: Packed, prefix: Prefix | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens at each place of packed or right-padded rows: ids and probabilities, each ``[U, count]``."""
    row = row.to(backbone.device)
    cache: dict[str, Any] = {"past_key_values": prefix.cache(len(row.ids))} if prefix else {}
    if not backbone.knows_head:
        logits = _kept_logits(backbone, row, use_cache=bool(prefix), **cache)
        found = logits.float().softmax(-1).topk(count)
        return found.indices, found.values
    with HeadTap(backbone.model.get_output_embeddings()) as tap:
        _forward(backbone, row, use_cache=bool(prefix), **cache)
    return top_at(backbone, tap.at(row.keep), count)


def micro_batches(segments: Sequence[Segment], opening: int, budget: int) -> Iterator[list[int]]:
    """Indices of consecutive segments that fit a packed row of ``budget`` tokens together.

    A segment that is over the budget alone gets a row of its own.
    """
    run: list[int] = []
    used = opening
    for i, segment in enumerate(segments):
        if run and used + segment.tokens > budget:
            yield run
            run, used = [], opening
        run.append(i)
        used += segment.tokens
    if run:
        yield run


def _gathered(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of ``targets`` ``[M]`` under the model's own ``logits`` ``[M, V]``, in float32."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def _kept_logits(backbone: Backbone, row: Packed, **cache: Any) -> torch.Tensor:
    """The model's own logits ``[U, V]`` at the places that are kept.

    A head that is spread over processes runs inside the model's forward or not at all, but on those places alone.
    """
    if not backbone.world.layout.sharded:
        every: torch.Tensor = _forward(backbone, row, **cache).logits
        return every.flatten(0, 1)[row.keep]
    head = backbone.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, 1)[row.keep][None], *args[1:]))
    try:
        found: torch.Tensor = _forward(backbone, row, **cache).logits[0]
        return found
    finally:
        hook.remove()


def _forward(backbone: Backbone, row: Packed, **cache: Any) -> Any:
    """The model's forward over packed rows with their mask, or over right-padded rows without one."""
    kwargs = dict(cache)
    if row.positions is not None:
        kwargs["attention_mask"] = _masks(backbone, row)
        if "position_ids" in _accepted(backbone.model):
            kwargs["position_ids"] = row.positions
    return backbone.model(input_ids=row.ids, **kwargs)


def _masks(backbone: Backbone, row: Packed) -> Any:
    """The mask in the form the model's layers want: one, or one for each kind of layer."""
    config = backbone.config
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())

    def mask(width: int | None) -> Any:
        if config._attn_implementation == "flex_attention":
            return block_mask(row, width)
        return additive(visible(row, width), backbone.dtype)

    if kinds == {"full_attention", "sliding_attention"}:
        return {"full_attention": mask(None), "sliding_attention": mask(window)}
    return mask(None if kinds == {"full_attention"} else window)


def _run_padded(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor, cache: Any, last: bool = False) -> Any:
    """A forward pass over ``ids`` ``[B, N]`` after what the cache holds; ``mask`` ``[B, S + N]`` covers both."""
    kwargs: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
    if "position_ids" in _accepted(backbone.model):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        kwargs["position_ids"] = positions.to(backbone.device)
    if "logits_to_keep" in _accepted(backbone.model):
        kwargs["logits_to_keep"] = 1 if last else 0
    device = backbone.device
    return backbone.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=True, **kwargs)


def _accepted(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
