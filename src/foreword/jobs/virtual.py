"""What single virtual tokens are: their nearest words, the way they went, and the soft prompt without each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from foreword.backbone.attach import no_prompt
from foreword.backbone.choose import Layout
from foreword.backbone.load import Backbone
from foreword.evaluation.evaluate import run_rows, validation_scores
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
    """Each virtual token by its nearest words (rows only), its norm, and its distance from the start.

    Args:
        backbone: whose vocabulary it is.
        prompt: ``[P, W]``.
        start: what training began from, of the same shape; None: unknown.
    """
    values = prompt.values.detach().cpu().double()
    near = nearest(backbone, values) if prompt.kind == "rows" else [((), ())] * prompt.tokens
    tokens = [
        VirtualToken(cosine, distance, float(row.norm())) for (cosine, distance), row in zip(near, values, strict=True)
    ]
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
    base = _judged(backbone, prompt, rows, label_ids, layout)
    without = {k: _judged(backbone, *_dropped(backbone, prompt, rows, k), label_ids, layout) for k in tokens}
    return LeftOut(
        len(rows),
        len(examples),
        base["loss"],
        base.get("accuracy"),
        {k: found["loss"] - base["loss"] for k, found in without.items()},
        {k: found["accuracy"] - base["accuracy"] for k, found in without.items()} if label_ids else {},
        trained_on,
    )


def rows_read(scored: int, tokens: int, device: str) -> int:
    """How many of the scored rows are read once a token: scoring read each twice (once without the soft prompt)."""
    most = max(LEAST_ROWS, 2 * scored // max(tokens, 1)) if device == "cpu" else MOST_ROWS
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
) -> dict[str, float]:
    """Loss, and accuracy where there are classes; nothing is written, which would take the longest."""
    if label_ids:
        return validation_scores(run_rows(backbone, prompt, rows, label_ids, layout))
    logprobs = target_logprobs(backbone, prompt, rows, layout)
    return {"loss": -sum(logprobs) / sum(len(e.target) for e in rows)}


def _dropped(
    backbone: Backbone, prompt: SoftPrompt, rows: Sequence[Example], k: int
) -> tuple[SoftPrompt, Sequence[Example]]:
    """The soft prompt and the rows without virtual token ``k``."""
    if prompt.kind == "rows":
        gone = backbone.vocab_size + k
        return prompt, [replace(e, context=tuple(i for i in e.context if i != gone)) for e in rows]
    kept = [i for i in range(prompt.tokens) if i != k]
    return (SoftPrompt(prompt.values[kept], "prefix") if kept else no_prompt(backbone)), rows
