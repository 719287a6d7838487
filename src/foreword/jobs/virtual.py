"""What single virtual tokens are: their nearest words, the way they went, and the soft prompt without each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from foreword.backbone.attach import no_prompt
from foreword.backbone.choose import Layout
from foreword.backbone.load import Backbone
from foreword.evaluation.evaluate import run_rows
from foreword.evaluation.intervals import Floats, interval
from foreword.evaluation.scoring import target_logprobs
from foreword.jobs.prepare import embedded
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example
from foreword.report.facts import LeftOut, Near, VirtualToken

NEAREST = 3
CHUNK = 8192
"""Vocabulary rows held at once."""
SPARE = 8
"""Candidates by rounded distances, of which exact ones choose: float32 products lose the last digits."""
MOST_TOKENS = 32
MOST_ROWS = 100
LEAST_ROWS = 8


def describe(backbone: Backbone, prompt: SoftPrompt, start: SoftPrompt | None) -> list[VirtualToken]:
    """Each virtual token by its nearest words (rows only) and its distance from the start.

    Args:
        backbone: whose vocabulary it is.
        prompt: ``[P, W]``.
        start: what training began from, of the same shape; None: unknown.
    """
    values = prompt.values.detach().cpu().double()
    near = nearest(backbone, values) if prompt.kind == "rows" else [((), ())] * prompt.tokens
    tokens = [VirtualToken(by_cosine, by_distance) for by_cosine, by_distance in near]
    if start is None or start.values.shape != prompt.values.shape:
        return tokens
    before = start.values.detach().cpu().double()
    moved = (values - before).norm(dim=1).tolist()
    norms = before.norm(dim=1).tolist()
    return [replace(t, moved=m, moved_share=m / n if n else None) for t, m, n in zip(tokens, moved, norms, strict=True)]


def nearest(backbone: Backbone, values: torch.Tensor) -> list[tuple[tuple[Near, ...], tuple[Near, ...]]]:
    """For each row of ``values`` ``[P, H]`` the vocabulary tokens nearest by cosine, and by L2 distance."""
    size = min(backbone.vocab_size, len(backbone.tokenizer))  # embeddings are often padded with rows of no token
    candidates = _candidates(backbone, values.float(), size)
    found = []
    for row, ids in zip(values, candidates, strict=True):
        words = embedded(backbone, ids).double()
        cosines = torch.nn.functional.cosine_similarity(words, row[None], dim=1).tolist()
        distances = (words - row).norm(dim=1).tolist()
        closest = sorted(zip(distances, ids, strict=True))[:NEAREST]
        likest = sorted(zip([-c for c in cosines], ids, strict=True))[:NEAREST]
        found.append(
            (
                tuple((_word(backbone, i), -c) for c, i in likest),
                tuple((_word(backbone, i), d) for d, i in closest),
            )
        )
    return found


def _candidates(backbone: Backbone, values: torch.Tensor, size: int) -> list[list[int]]:
    """Ids that may be among the nearest of each row, by either measure."""
    scores: list[list[torch.Tensor]] = [[], []]
    ids: list[list[torch.Tensor]] = [[], []]
    for begin in range(0, size, CHUNK):
        words = embedded(backbone, range(begin, min(begin + CHUNK, size)))
        products, norms = values @ words.T, words.norm(dim=1)
        measures = (products / norms.clamp(min=1e-12), 2 * products - norms.square())  # higher is nearer
        for k, measure in enumerate(measures):
            top = measure.topk(min(SPARE, len(words)), dim=1)
            scores[k].append(top.values)
            ids[k].append(top.indices + begin)
    best = []
    for k in range(2):
        whole, named = torch.cat(scores[k], 1), torch.cat(ids[k], 1)
        best.append(named.gather(1, whole.topk(min(SPARE, whole.shape[1]), dim=1).indices))
    return [sorted(set(row)) for row in torch.cat(best, 1).tolist()]


def _word(backbone: Backbone, token_id: int) -> str:
    """A token as text; its own name where it is only a part of a character."""
    text = str(backbone.tokenizer.decode([token_id]))
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return str(backbone.tokenizer.convert_ids_to_tokens(token_id))


def leave_one_out(
    backbone: Backbone,
    prompt: SoftPrompt,
    examples: Sequence[Example],
    label_ids: Sequence[Sequence[int]],
    layout: Layout,
    trained_on: bool = False,
) -> LeftOut:
    """The change of loss and accuracy on scored rows when one virtual token is dropped, for each.

    At most 32 tokens and 100 rows, evenly chosen; on a CPU as few rows as take about the time of scoring.

    Args:
        backbone: the model.
        prompt: the soft prompt.
        examples: scored rows; their contexts hold the virtual ids.
        label_ids: label words of each class; empty for free text, which has no accuracy here.
        layout: how rows share a forward pass.
        trained_on: whether the soft prompt was trained on these rows.
    """
    tokens = evenly(prompt.tokens, MOST_TOKENS)
    rows = _sample(examples, rows_read(len(examples), len(tokens), backbone.device.type))
    targets = np.asarray([len(e.target) for e in rows], dtype=float)
    base, right = _judged(backbone, prompt, rows, label_ids, layout)
    changes: dict[int, float] = {}
    intervals: dict[int, tuple[float, float]] = {}
    accuracies: dict[int, float] = {}
    for k in tokens:
        logprobs, hits = _judged(backbone, *_dropped(backbone, prompt, rows, k), label_ids, layout)
        changes[k], intervals[k] = _change(base - logprobs, targets)
        if right is not None and hits is not None:
            accuracies[k] = float(hits.mean() - right.mean())
    return LeftOut(
        len(rows), len(examples), float(-base.sum() / targets.sum()), None if right is None else float(right.mean()),
        changes, intervals, accuracies, trained_on,
    )  # fmt: skip


def _change(worse: Floats, targets: Floats) -> tuple[float, tuple[float, float]]:
    """Mean change of the loss a target token, and its 95 % bootstrap interval over rows.

    Args:
        worse: log-probability each row's target lost ``[n]``.
        targets: its tokens ``[n]``.
    """
    low, high = interval(len(worse), lambda i: float(worse[i].sum() / targets[i].sum()))
    return float(worse.sum() / targets.sum()), (low, high)


def rows_read(scored: int, tokens: int, device: str) -> int:
    """How many of the scored rows are read once a token.

    On a CPU about as many in all as were scored: few rows at a time take up to twice as long a row (measured on
    SmolLM2-135M), so that it comes to the time of scoring with and without the soft prompt.
    """
    most = max(LEAST_ROWS, scored // max(tokens, 1)) if device == "cpu" else MOST_ROWS
    return min(scored, most, MOST_ROWS)


def _sample(examples: Sequence[Example], most: int) -> list[Example]:
    """At most ``most`` of the rows, of every class its share: files often alternate or sort their classes."""
    by_class = sorted(examples, key=lambda e: e.label or 0)
    return [by_class[i] for i in evenly(len(by_class), most)]


def evenly(size: int, most: int) -> list[int]:
    """At most ``most`` of the indices below ``size``, evenly spaced, the first among them."""
    return list(range(size)) if size <= most else [i * size // most for i in range(most)]


def _judged(
    backbone: Backbone,
    prompt: SoftPrompt,
    rows: Sequence[Example],
    label_ids: Sequence[Sequence[int]],
    layout: Layout,
) -> tuple[Floats, Floats | None]:
    """Each row's log-probability of its target, and whether its class was right ``[n]``; no text is written."""
    if not label_ids:
        return np.asarray(target_logprobs(backbone, prompt, rows, layout)), None
    outcome = run_rows(backbone, prompt, rows, label_ids, layout)
    assert outcome.probabilities is not None
    right = outcome.probabilities.argmax(1) == np.asarray(outcome.truth)
    return np.asarray(outcome.logprobs), right.astype(float)


def _dropped(
    backbone: Backbone, prompt: SoftPrompt, rows: Sequence[Example], k: int
) -> tuple[SoftPrompt, Sequence[Example]]:
    """The soft prompt and the rows without virtual token ``k``."""
    if prompt.kind == "rows":
        gone = backbone.vocab_size + k
        return prompt, [replace(e, context=tuple(i for i in e.context if i != gone)) for e in rows]
    kept = [i for i in range(prompt.tokens) if i != k]
    return (SoftPrompt(prompt.values[kept], "prefix") if kept else no_prompt(backbone)), rows
