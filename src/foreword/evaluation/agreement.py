"""How far a soft prompt says what another one says: the same next tokens, place by place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from foreword.backbone.attach import attached
from foreword.backbone.choose import Layout
from foreword.backbone.forward import micro_batches, top_tokens
from foreword.backbone.layout import pack, right_padded
from foreword.backbone.load import Backbone
from foreword.evaluation.scoring import GPU_BUDGET, SCORING_BUDGET, Floats
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens at each of a segment's target places: ids and probabilities ``[n, count]``."""

    ids: torch.Tensor
    probabilities: torch.Tensor


def candidates(
    backbone: Backbone, prompt: SoftPrompt, segments: Sequence[Segment], count: int, layout: Layout
) -> list[Candidates]:
    """What the backbone with a soft prompt would say at every token of each segment's only branch.

    Args:
        backbone: the model.
        prompt: the soft prompt.
        segments: whole contexts, virtual ids included.
        count: how many tokens a place.
        layout: packed, or right-padded rows for any other.
    """
    budget = SCORING_BUDGET if backbone.device.type == "cpu" else GPU_BUDGET
    found: list[Candidates] = []
    with torch.no_grad(), attached(backbone, prompt) as prefix:
        for part in micro_batches(segments, 0, budget):
            chosen = [((), [segments[i]]) for i in part] if layout != "packed" else [((), [segments[i] for i in part])]
            row = pack(chosen, prefix.size if prefix else 0) if layout == "packed" else right_padded(chosen)
            ids, probabilities = top_tokens(backbone, row, prefix, count)
            sizes = [len(segments[i].branches[0]) for i in part]
            pairs = zip(torch.split(ids.cpu(), sizes), torch.split(probabilities.cpu(), sizes), strict=True)
            found += [Candidates(i, p) for i, p in pairs]
    return found


def softened(segments: Sequence[Segment], teacher: Sequence[Candidates]) -> Iterator[Segment]:
    """Segments whose targets are the teacher's likeliest tokens, their probabilities summing to one."""
    for segment, found in zip(segments, teacher, strict=True):
        shares = found.probabilities / found.probabilities.sum(1, keepdim=True)
        places = zip(found.ids.tolist(), shares.tolist(), strict=True)
        yield replace(segment, soft=tuple((tuple(ids), tuple(p)) for ids, p in places))


def agreement(teacher: Sequence[NDArray[np.int64]], student: Sequence[NDArray[np.int64]]) -> Floats:
    """For each segment the share of its places where both say the same ``[n]``."""
    return np.array([float((t == s).mean()) for t, s in zip(teacher, student, strict=True)])
