"""The scores of a soft prompt on labelled rows, always beside its baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from foreword.backbone.attach import no_prompt
from foreword.backbone.choose import Layout
from foreword.backbone.generate import BATCH, Sampling, generate
from foreword.backbone.load import Backbone
from foreword.evaluation.metrics import classification_scores, interval, point_scores, token_loss
from foreword.evaluation.scoring import Floats, class_probabilities, needs_end, score_branches, target_logprobs
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example

Progress = Callable[[int], None]


def silent(rows: int) -> None:
    """Progress nobody looks at."""


@dataclass(frozen=True)
class Outcome:
    """What a soft prompt did on ``n`` rows; scores are computed from it.

    ``logprobs`` ``[n]`` of each row's own target; ``probabilities`` ``[n, C]`` of the classes,
    or ``matches`` ``[n]`` (greedy text equals the target) for free text.
    """

    truth: list[int]
    target_tokens: list[int]
    logprobs: list[float]
    probabilities: Floats | None = None
    matches: Floats | None = None


def run_rows(
    backbone: Backbone,
    prompt: SoftPrompt,
    examples: Sequence[Example],
    label_ids: Sequence[Sequence[int]],
    layout: Layout,
    progress: Progress = silent,
) -> Outcome:
    """Runs a soft prompt over labelled rows (their contexts hold its virtual ids).

    Classes by likelihood of their label words; free text by its greedy continuation.
    """
    tokens = [len(e.target) for e in examples]
    if not label_ids:
        logprobs = target_logprobs(backbone, prompt, examples, layout)
        return Outcome([], tokens, logprobs, matches=greedy_matches(backbone, prompt, examples, progress))
    truth = [e.label or 0 for e in examples]
    branches = [label_ids] * len(examples)
    scores = score_branches(backbone, prompt, [e.context for e in examples], branches, layout, progress)
    own = scores.full[np.arange(len(truth)), truth].tolist()
    return Outcome(truth, tokens, own, class_probabilities(scores, needs_end(label_ids)))


def run_plain(
    backbone: Backbone,
    examples: Sequence[Example],
    label_ids: Sequence[Sequence[int]],
    layout: Layout,
    progress: Progress = silent,
) -> Outcome:
    """The same rows by the backbone zero-shot: the template alone, without virtual tokens."""
    plain = [replace(e, context=tuple(i for i in e.context if i < backbone.vocab_size)) for e in examples]
    return run_rows(backbone, no_prompt(backbone), plain, label_ids, layout, progress)


def greedy_matches(backbone: Backbone, prompt: SoftPrompt, examples: Sequence[Example], progress: Progress) -> Floats:
    """1 where a row's greedy text is its target, white space at the ends aside ``[n]``."""
    longest = max(len(e.target) for e in examples)
    matches: list[bool] = []
    for at in range(0, len(examples), BATCH):
        batch = examples[at : at + BATCH]
        texts = generate(backbone, prompt, [e.context for e in batch], Sampling(max_new_tokens=longest))
        said = backbone.tokenizer.batch_decode(texts, skip_special_tokens=True)
        matches += [s.strip() == e.text.strip() for s, e in zip(said, batch, strict=True)]
        progress(len(batch))
    return np.asarray(matches, dtype=float)


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    """The rows of several outcomes as one (the held-out rows of all folds)."""
    first = outcomes[0]
    return Outcome(
        [t for o in outcomes for t in o.truth],
        [t for o in outcomes for t in o.target_tokens],
        [x for o in outcomes for x in o.logprobs],
        None if first.probabilities is None else np.concatenate([o.probabilities for o in outcomes]),
        None if first.matches is None else np.concatenate([o.matches for o in outcomes]),
    )


def scores_of(outcome: Outcome, classes: Sequence[str]) -> dict[str, Any]:
    """All scores of an outcome with their intervals; loss and perplexity are over target tokens."""
    loss = token_loss(outcome.logprobs, outcome.target_tokens)
    if outcome.probabilities is not None:
        scores = classification_scores(outcome.truth, outcome.probabilities, classes)
    else:
        assert outcome.matches is not None
        hits = outcome.matches
        scores = {
            "n": len(hits),
            "exact_match": float(hits.mean()),
            "intervals": {"exact_match": interval(len(hits), lambda i: float(hits[i].mean()))},
        }
    scores["intervals"].update(loss.pop("intervals"))
    return {**scores, **loss}


def validation_scores(outcome: Outcome) -> dict[str, float]:
    """Loss over target tokens, and accuracy and macro-F1 or exact match: no intervals."""
    loss = {"loss": -sum(outcome.logprobs) / sum(outcome.target_tokens)}
    if outcome.probabilities is not None:
        return {**loss, **point_scores(outcome.truth, outcome.probabilities)}
    assert outcome.matches is not None
    return {**loss, "exact_match": float(outcome.matches.mean())}


def with_baselines(
    outcome: Outcome, plain: Outcome, counts: Sequence[int], classes: Sequence[str], protocol: str
) -> dict[str, Any]:
    """The scores of an outcome beside its baselines, as ``foreword evaluate --json`` writes them.

    Args:
        outcome: of the soft prompt.
        plain: of the backbone without it, on the same rows.
        counts: training rows of each class ``[C]``, for the majority class.
        classes: names; empty for free text.
        protocol: which rows these are, in words.
    """
    baselines: dict[str, Any] = {"zero_shot": scores_of(plain, classes)}
    if classes:
        baselines["majority"] = majority_baseline(counts, outcome.truth, classes)
    return {**scores_of(outcome, classes), "baselines": baselines, "protocol": protocol}


def label_counts(examples: Sequence[Example], classes: Sequence[str]) -> list[int]:
    """Rows of each class, in the classes' order ``[C]``; empty for free text."""
    labels = [e.label for e in examples]
    return [labels.count(c) for c in range(len(classes))]


def majority_baseline(counts: Sequence[int], truth: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
    """Always answers the class with the most training rows (``counts`` ``[C]``)."""
    winner = int(np.argmax(counts))
    probabilities = np.zeros((len(truth), len(classes)))
    probabilities[:, winner] = 1.0
    scores = classification_scores(truth, probabilities, classes)
    return {
        "class": classes[winner],
        "accuracy": scores["accuracy"],
        "macro_f1": scores["macro_f1"],
        "intervals": {k: scores["intervals"][k] for k in ("accuracy", "macro_f1")},
    }
