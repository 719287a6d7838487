"""What several soft prompts say together: the mean of their probabilities, computed in the same passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from foreword.backbone.attach import attached
from foreword.backbone.choose import Layout
from foreword.backbone.forward import Prefix, compute_prefix, micro_batches, packed_logprobs
from foreword.backbone.load import Backbone
from foreword.data.encode import common_opening
from foreword.evaluation.evaluate import Outcome
from foreword.evaluation.scoring import (
    Floats,
    class_probabilities,
    classify,
    gather,
    scored_branches,
    scoring_budget,
)
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment


def averaged(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of an ensemble of classifiers on rows that all of them scored, in one order.

    Label probabilities ``[n, C]`` are averaged; the likelihood of a target is the mean of its likelihoods.
    """
    first = outcomes[0]
    if len(outcomes) == 1:
        return first
    tables = [o.probabilities for o in outcomes]
    assert all(t is not None for t in tables)
    own = np.array([o.logprobs for o in outcomes])
    logprobs = np.logaddexp.reduce(own, axis=0) - np.log(len(outcomes))
    return Outcome(first.truth, first.target_tokens, logprobs.tolist(), np.mean(np.array(tables), axis=0))


def classify_together(
    backbone: Backbone,
    prompts: Sequence[SoftPrompt],
    contexts: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    layout: Layout,
) -> list[Floats]:
    """Label probabilities ``[n, C]`` by each of ``K`` soft prompts of one kind and size.

    Where rows pack, every pass has ``K`` rows: the same segments after each soft prompt's keys and values.

    Args:
        backbone: the model.
        prompts: the soft prompts.
        contexts: ids of each row's whole context, virtual ids from ``V`` on for whoever reads them.
        label_ids: label words of each class, end token included.
        layout: how rows share a forward pass.
    """
    opening = common_opening(contexts)
    if layout != "packed" or len(prompts) == 1 or not (opening or prompts[0].kind == "prefix"):
        return [classify(backbone, p, contexts, label_ids, layout) for p in prompts]
    branches = tuple(tuple(b) for b in scored_branches(label_ids))
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    segments = [Segment(tuple(contexts[i][len(opening) :]), branches) for i in order]
    found: list[torch.Tensor] = []
    with torch.no_grad():
        prefix = _stacked([_read(backbone, p, opening) for p in prompts])
        for batch in micro_batches(segments, 0, max(scoring_budget(backbone) // len(prompts), 1)):
            rows = [((), [segments[i] for i in batch])] * len(prompts)
            found.append(packed_logprobs(backbone, rows, prefix).double().cpu().reshape(len(prompts), -1))
    values = torch.cat(found, dim=1)
    return [class_probabilities(gather(v, order, segments), with_end=True) for v in values]


def _read(backbone: Backbone, prompt: SoftPrompt, opening: tuple[int, ...]) -> Prefix:
    """Keys and values of a soft prompt and what follows it in every context."""
    with attached(backbone, prompt) as before:
        if opening:
            return compute_prefix(backbone, opening, before)
        assert before is not None
        return before


def _stacked(prefixes: Sequence[Prefix]) -> Prefix:
    """Prefixes of one size, one a row."""
    layers = zip(*(p.layers for p in prefixes), strict=True)
    joined = tuple((torch.cat([k for k, _ in same]), torch.cat([v for _, v in same])) for same in layers)
    return Prefix(joined, prefixes[0].size)
