"""Scoring rows: every class by the likelihood of its label words.

The opening (soft prompt and the template's constant text) is read once; all classes of a row
share its context's keys and values; rows are sorted by length and answered in input order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from foreword.backbone.attach import attached
from foreword.backbone.choose import Layout
from foreword.backbone.forward import (
    compute_prefix,
    micro_batches,
    packed_logprobs,
    rows_logprobs,
    shared_logprobs,
)
from foreword.backbone.load import Backbone
from foreword.data.encode import common_opening
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Segment

Floats = NDArray[np.float64]
Progress = Callable[[int], None]
SCORING_BUDGET = 512
"""Tokens of one packed row when scoring: attention over the row grows with its square, and
512 has the lowest time per token on 2 CPU cores (3.1 ms; 128: 4.2, 1024: 3.6)."""
GPU_BUDGET = 4096


LOGPROBS = {"packed": packed_logprobs, "shared": shared_logprobs, "rows": rows_logprobs}


def silent(rows: int) -> None:
    """Progress nobody looks at."""


@dataclass(frozen=True)
class BranchScores:
    """What scoring returns for ``n`` contexts with ``C`` branches each.

    ``words`` ``[n, C]``: summed log-probability of the label words; ``full`` ``[n, C]``: with
    the end token, as in training.
    """

    words: Floats
    full: Floats


def score_branches(
    backbone: Backbone,
    prompt: SoftPrompt,
    contexts: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Sequence[int]]],
    layout: Layout,
    progress: Progress = silent,
) -> BranchScores:
    """Log-probabilities of each row's branches; several processes divide the rows.

    Args:
        backbone: the model.
        prompt: the soft prompt; an empty one scores the plain backbone.
        contexts: ids of each row's whole context, virtual ids included.
        branches: for each row its branches' ids, each closed by the end token.
        layout: how rows share a forward pass.
        progress: told the number of rows done since the last call.
    """

    def own(share: Sequence[int]) -> list[tuple[Floats, Floats]]:
        mine = [contexts[i] for i in share], [branches[i] for i in share]
        found = _score_own(backbone, prompt, *mine, layout, scaled(progress, len(share), len(contexts)))
        return list(zip(found.words, found.full, strict=True))

    words, full = zip(*backbone.world.divided(range(len(contexts)), own), strict=True)
    return BranchScores(np.stack(words), np.stack(full))


def scaled(progress: Progress, mine: int, total: int) -> Progress:
    """Tells of all rows as many as this process did of its share: the others are about as far."""
    done = 0

    def tell(rows: int) -> None:
        nonlocal done
        before, done = done, done + rows
        progress(done * total // mine - before * total // mine)

    return tell


def _score_own(
    backbone: Backbone,
    prompt: SoftPrompt,
    contexts: Sequence[Sequence[int]],
    branches: Sequence[Sequence[Sequence[int]]],
    layout: Layout,
    progress: Progress,
) -> BranchScores:
    """The rows of this process."""
    budget = scoring_budget(backbone)
    opening = common_opening(contexts)
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
    segments = [Segment(tuple(contexts[i][len(opening) :]), tuple(tuple(b) for b in branches[i])) for i in order]
    found: list[torch.Tensor] = []
    with torch.no_grad(), attached(backbone, prompt) as prefix:
        start: tuple[int, ...] = opening
        if layout == "packed" and opening:
            prefix, start = compute_prefix(backbone, opening, prefix), ()
        for batch in micro_batches(segments, len(start), budget):
            rows = [(start, [segments[i] for i in batch])]
            values = LOGPROBS[layout](backbone, rows, prefix)
            found.append(values.double().cpu())
            progress(len(batch))
    return gather(torch.cat(found), order, segments)


def class_probabilities(scores: BranchScores, with_end: bool) -> Floats:
    """Label probabilities ``[n, C]``: the softmax over the classes' log-likelihoods."""
    return softmax(scores.full if with_end else scores.words)


def softmax(values: Floats) -> Floats:
    """Probabilities ``[n, C]`` in proportion to the exponentials."""
    shifted = np.exp(values - values.max(1, keepdims=True))
    probabilities: Floats = shifted / shifted.sum(1, keepdims=True)
    return probabilities


def rebalanced(probabilities: Floats, biases: Sequence[float]) -> Floats:
    """Label probabilities ``[n, C]`` after a bias for each class ``[C]`` in nats; without any as they are."""
    if not biases:
        return probabilities
    odds = probabilities * np.exp(biases)
    found: Floats = odds / odds.sum(1, keepdims=True)
    return found


def needs_end(label_ids: Sequence[Sequence[int]]) -> bool:
    """Whether the end token must be counted: some label words are the beginning of others."""
    words = [tuple(ids[:-1]) for ids in label_ids]
    return any(a != b and b[: len(a)] == a for a in words for b in words)


def scored_branches(label_ids: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """What is scored of each class's label words; their end token is only read where it decides."""
    return list(label_ids) if needs_end(label_ids) else [ids[:-1] for ids in label_ids]


def classify(
    backbone: Backbone,
    prompt: SoftPrompt,
    contexts: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    layout: Layout,
    progress: Progress = silent,
) -> Floats:
    """Label probabilities ``[n, C]`` of each context; end tokens are only read where they decide."""
    branches = scored_branches(label_ids)
    scores = score_branches(backbone, prompt, contexts, [branches] * len(contexts), layout, progress)
    return class_probabilities(scores, with_end=True)


def target_logprobs(backbone: Backbone, prompt: SoftPrompt, examples: Sequence[Example], layout: Layout) -> list[float]:
    """Log-probability of each example's own target, end token included (free-text tasks)."""
    scores = score_branches(backbone, prompt, [e.context for e in examples], [[e.target] for e in examples], layout)
    return [float(x) for x in scores.full[:, 0]]


def scoring_budget(backbone: Backbone) -> int:
    """Tokens of one pass when scoring."""
    return SCORING_BUDGET if backbone.device.type == "cpu" else GPU_BUDGET


def gather(values: torch.Tensor, order: Sequence[int], segments: Sequence[Segment]) -> BranchScores:
    """Sums flat branch-token values (segment, branch, token) into ``[n, C]``, in input order."""
    count = len(segments[0].branches)
    words, full = np.zeros((len(order), count)), np.zeros((len(order), count))
    flat, at = values.numpy(), 0
    for row, segment in zip(order, segments, strict=True):
        for c, branch in enumerate(segment.branches):
            end = at + len(branch)
            words[row, c], full[row, c] = flat[at : end - 1].sum(), flat[at:end].sum()
            at = end
    return BranchScores(words, full)
