"""Which layout a model gets: by what the model is, then proved on a first batch.

Architectures differ in what they do with a 4-D mask, so the choice is checked against plain
one-row forwards, loss and gradient. A layout that disagrees is not used, and the log says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from foreword.backbone.attach import attached
from foreword.backbone.forward import Prefix, Rows, packed_logprobs, shared_logprobs
from foreword.backbone.load import Backbone
from foreword.data.encode import common_opening
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment

Layout = Literal["packed", "shared", "rows"]

ALIBI = {"bloom", "mpt"}
"""Families whose position bias comes from a 2-D mask."""


class Tolerance(NamedTuple):
    """Largest differences that are rounding; masks and positions that are wrong differ by far more."""

    values: float
    """Of a log-probability."""
    gradient: float
    """Of the gradient, as a part of its norm."""
    alone: float
    """Of a log-probability where no gradient is compared."""


TOLERANCE = {torch.float64: Tolerance(1e-6, 2e-4, 1e-6), torch.float32: Tolerance(2e-3, 4e-3, 2e-3)}
LOW_PRECISION = Tolerance(0.8, 0.15, 0.4)
"""In 16 bits log-probabilities differ by up to 0.5 and gradients by 0.07; with a wrong mask or wrong positions by 0.2
to 8 and by 0.22 to 0.9, so there the gradient tells (docs/log.md)."""


@dataclass(frozen=True)
class Choice:
    """The layout for training and for scoring, with the reason in words."""

    train: Layout
    score: Layout
    reason: str


def choose_layout(backbone: Backbone, prompt: SoftPrompt, segments: Sequence[Segment], gradient: bool = True) -> Choice:
    """Tries the layouts on a few short segments, the cheapest first.

    Args:
        backbone: the model.
        prompt: the soft prompt.
        segments: examples of the task with whole contexts, virtual ids included; each the same number of branches.
        gradient: compare gradients too (training needs them, scoring does not).
    """
    kind = str(backbone.config.model_type)
    if getattr(backbone.model, "_is_stateful", False):
        return Choice("rows", "rows", f"{kind} is recurrent: right-padded rows")
    # Whether the model heeds mask and positions shows between two neighbours: segments, or branches of the only one.
    few = sorted(segments, key=lambda s: s.tokens)[:2]
    sample = [Segment(s.context, s.branches[: 1 if len(few) > 1 else 2]) for s in few]
    reference = _evaluate(backbone, prompt, sample, _one_by_one, gradient)
    alibi = kind in ALIBI or bool(getattr(backbone.config, "alibi", False))
    if not alibi and _agrees(backbone, prompt, sample, packed_logprobs, reference):
        return Choice("packed", "packed", f"{kind} packs: equal to one-row forwards on the first rows")
    why = "takes its position bias from a 2-D mask" if alibi else "does not take a packed row"
    if _agrees(backbone, prompt, sample, shared_logprobs, reference):
        return Choice("rows", "shared", f"{kind} {why}: right-padded rows, contexts shared in scoring")
    return Choice("rows", "rows", f"{kind} {why}: right-padded rows")


LogProbs = Callable[[Backbone, Rows, Prefix | None], torch.Tensor]


def _evaluate(
    backbone: Backbone,
    prompt: SoftPrompt,
    segments: Sequence[Segment],
    logprobs: LogProbs,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities ``[M]`` and, if asked for, their sum's gradient in the values ``[P, W]``."""
    opening = common_opening([s.context for s in segments])  # shared, as training and scoring will
    own = [replace(s, context=s.context[len(opening) :]) for s in segments]
    leaf = prompt.values.detach().clone().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient), attached(backbone, SoftPrompt(leaf, prompt.kind)) as prefix:
        values = logprobs(backbone, [(opening, own)], prefix)
        found = torch.autograd.grad(values.sum(), leaf)[0] if gradient else None
    return values.detach(), found


def _one_by_one(backbone: Backbone, rows: Rows, prefix: Prefix | None) -> torch.Tensor:
    """The reference: one row at a time through the model's own forward, all logits."""
    found = []
    for opening, segments in rows:
        for context, branch in ((s.context, b) for s in segments for b in s.branches):
            ids = torch.tensor([[*opening, *context, *branch[:-1]]], device=backbone.device)
            cache = {"past_key_values": prefix.cache(1, keep=True)} if prefix else {}
            logits = backbone.model(input_ids=ids, use_cache=bool(prefix), **cache).logits[0, -len(branch) :].float()
            targets = torch.tensor(branch, device=backbone.device)
            found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return torch.cat(found)


def _agrees(
    backbone: Backbone,
    prompt: SoftPrompt,
    segments: Sequence[Segment],
    logprobs: LogProbs,
    reference: tuple[torch.Tensor, torch.Tensor | None],
) -> bool:
    expected, slope = reference
    try:
        values, gradient = _evaluate(backbone, prompt, segments, logprobs, slope is not None)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
        return False  # the model's forward does not take this layout at all
    allowed = TOLERANCE.get(backbone.dtype, LOW_PRECISION)
    apart = (values - expected).abs().max()
    if slope is None or gradient is None:
        return bool(apart <= allowed.alone)
    return bool(
        apart <= allowed.values and (gradient - slope).norm() <= allowed.gradient * slope.norm().clamp(min=1e-12)
    )
