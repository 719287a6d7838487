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

from foreword.backbone.head import HeadTap, target_logprobs
from foreword.backbone.layout import Packed, additive, block_mask, left_pad, pack, right_padded, visible
from foreword.backbone.load import Backbone
from foreword.records import Segment

Rows = Sequence[tuple[Sequence[int], Sequence[Segment]]]
"""Openings (virtual ids and the template's opening), each with the segments that stand after it."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values ``[1, heads, S, head_dim]`` of an opening, layer by layer."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    size: int

    def cache(self) -> Any:
        """A fresh cache holding the opening; a forward pass appends to it."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for i, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, i)
        return cache


def packed_logprobs(backbone: Backbone, rows: Rows, prefix: Prefix | None = None) -> torch.Tensor:
    """Log-probability of every branch token, ``[M]`` in the order row, segment, branch, token.

    Args:
        backbone: the model, with virtual ids attached when an opening holds some.
        rows: openings, each with segments whose contexts leave it out.
        prefix: keys and values of the one opening of all rows, when they were computed before.
    """
    if prefix is None:
        return run(backbone, pack(rows))
    return run(backbone, pack([((), segments) for _, segments in rows], prefix.size), prefix)


def rows_logprobs(backbone: Backbone, rows: Rows) -> torch.Tensor:
    """The same as ``packed_logprobs`` by right-padded rows, one a branch, without any mask."""
    return run(backbone, right_padded(rows))


def shared_logprobs(backbone: Backbone, rows: Rows) -> torch.Tensor:
    """The same with each context read once: ``[pads][opening][context]``, then its branches.

    Every segment must have the same number of branches.
    """
    segments = [s for _, found in rows for s in found]
    device, count = backbone.device, len(segments[0].branches)
    ids, mask = left_pad([(*opening, *s.context) for opening, found in rows for s in found])
    first = _run_padded(backbone, ids, mask, None)
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


def compute_prefix(backbone: Backbone, opening: Sequence[int]) -> Prefix:
    """Reads the opening once and keeps its keys and values."""
    from transformers import DynamicCache

    # Without a config every layer of the cache is a full one: our own masks do the windows.
    cache = DynamicCache()
    row = pack([(opening, ())]).to(backbone.device)
    tap = HeadTap(backbone.model.get_output_embeddings()) if backbone.knows_head else nullcontext()
    with tap:
        _forward(backbone, row, past_key_values=cache, use_cache=True)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), len(opening))


def run(backbone: Backbone, row: Packed, prefix: Prefix | None = None) -> torch.Tensor:
    """Log-probabilities ``[M]`` of the targets of packed or right-padded rows."""
    row = row.to(backbone.device)
    cache: dict[str, Any] = {"past_key_values": prefix.cache()} if prefix else {}
    if not backbone.knows_head:
        logits = _forward(backbone, row, use_cache=bool(prefix), **cache).logits.flatten(0, 1)
        return _gathered(logits[row.keep[row.place]], row.targets)
    with HeadTap(backbone.model.get_output_embeddings()) as tap:
        _forward(backbone, row, use_cache=bool(prefix), **cache)
    return target_logprobs(backbone, tap.at(row.keep), row.place, row.targets)


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


def _run_padded(backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> Any:
    kwargs: dict[str, Any] = {"past_key_values": cache} if cache is not None else {}
    if "position_ids" in _accepted(backbone.model):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        kwargs["position_ids"] = positions.to(backbone.device)
    if "logits_to_keep" in _accepted(backbone.model):
        kwargs["logits_to_keep"] = 1 if cache is None else 0
    device = backbone.device
    return backbone.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=True, **kwargs)


def _accepted(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
