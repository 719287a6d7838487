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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from foreword.backbone.layout import Packed, additive, left_pad, pack, visible
from foreword.backbone.load import Backbone
from foreword.records import Segment


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


def packed_logprobs(
    backbone: Backbone, opening: Sequence[int], segments: Sequence[Segment], prefix: Prefix | None = None
) -> torch.Tensor:
    """Log-probability of every branch token, ``[M]`` in the order segment, branch, token.

    Args:
        backbone: the model, with virtual ids attached when the opening holds some.
        opening: ids all segments share; ignored when ``prefix`` holds them.
        segments: contexts without the opening, and their branches.
        prefix: the opening's keys and values, when they were computed before.
    """
    row = pack(() if prefix else opening, segments, prefix.size if prefix else 0)
    cache = {"past_key_values": prefix.cache(), "use_cache": True} if prefix else {"use_cache": False}
    logits = _run_packed(backbone, row, row.keep, **cache)
    return target_logprobs(logits, row.targets.to(logits.device))


def compute_prefix(backbone: Backbone, opening: Sequence[int]) -> Prefix:
    """Reads the opening once and keeps its keys and values."""
    from transformers import DynamicCache

    # Without a config every layer of the cache is a full one: our own masks do the windows.
    cache = DynamicCache()
    row = pack(opening, ())
    _run_packed(backbone, row, torch.tensor([len(opening) - 1]), past_key_values=cache, use_cache=True)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), len(opening))


def rows_logprobs(backbone: Backbone, opening: Sequence[int], segments: Sequence[Segment]) -> torch.Tensor:
    """The same as ``packed_logprobs`` by right-padded rows, one a branch, without any mask."""
    rows = [(*opening, *s.context, *b[:-1]) for s in segments for b in s.branches]
    branches = [b for s in segments for b in s.branches]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    keep = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (row, branch) in enumerate(zip(rows, branches, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        keep[i, len(row) - len(branch) : len(row)] = True
    keep = keep.to(backbone.device)
    kwargs = {"logits_to_keep": keep} if "logits_to_keep" in _accepted(backbone.model) else {}
    logits = backbone.model(input_ids=ids.to(backbone.device), use_cache=False, **kwargs).logits
    if not kwargs:
        logits = logits[keep]
    targets = torch.tensor([t for b in branches for t in b], device=logits.device)
    return target_logprobs(logits.reshape(len(targets), -1), targets)


def shared_logprobs(backbone: Backbone, opening: Sequence[int], segments: Sequence[Segment]) -> torch.Tensor:
    """The same with each context read once: ``[pads][opening][context]``, then its branches.

    Every segment must have the same number of branches.
    """
    device, count = backbone.device, len(segments[0].branches)
    ids, mask = left_pad([(*opening, *s.context) for s in segments])
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
    return target_logprobs(flat, torch.tensor([t for b in branches for t in b], device=device))


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of ``targets`` ``[M]`` under ``logits`` ``[M, V]``, in float32 ``[M]``."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


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


def _run_packed(backbone: Backbone, row: Packed, keep: torch.Tensor, **cache: Any) -> torch.Tensor:
    """Logits ``[M, V]`` of a packed row at the positions ``keep``."""
    device = backbone.device
    accepted = _accepted(backbone.model)
    kwargs: dict[str, Any] = dict(cache)
    if "position_ids" in accepted:
        kwargs["position_ids"] = row.positions[None].to(device)
    # Positions repeat where branches share a context's last token, so an index, not a mask.
    unique, place = torch.unique(keep, return_inverse=True)
    trimmed = "logits_to_keep" in accepted
    if trimmed:
        kwargs["logits_to_keep"] = unique.to(device)
    out = backbone.model(input_ids=row.ids[None].to(device), attention_mask=_masks(backbone, row), **kwargs)
    logits = out.logits[0] if trimmed else out.logits[0, unique.to(device)]
    found: torch.Tensor = logits[place.to(device)] if len(unique) < len(keep) else logits
    return found


def _masks(backbone: Backbone, row: Packed) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask in the form the model's layers want: one, or one for each kind of layer."""
    config = backbone.config
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())

    def mask(width: int | None) -> torch.Tensor:
        return additive(visible(row, width), backbone.dtype).to(backbone.device)

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
