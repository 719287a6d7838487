"""The scores of a soft prompt on labelled rows, always beside its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from foreword.backbone.attach import no_prompt
from foreword.backbone.choose import Layout
from foreword.backbone.generate import BATCH, Sampling, generate
from foreword.backbone.load import Backbone
from foreword.evaluation.metrics import classification_scores, point_scores, token_loss
from foreword.evaluation.scoring import (
    Floats,
    Progress,
    class_probabilities,
    needs_end,
    rebalanced,
    scaled,
    score_branches,
    silent,
    target_logprobs,
)
from foreword.evaluation.text_metrics import exact_matches, text_scores
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example


@dataclass(frozen=True)
class Outcome:
    """What a soft prompt did on ``n`` rows; scores are computed from it.

    ``logprobs`` ``[n]`` of each row's own target; ``probabilities`` ``[n, C]`` of the classes (None: free text).
    """

    truth: list[int]
    target_tokens: list[int]
    logprobs: list[float]
    probabilities: Floats | None = None
    texts: list[str] = field(default_factory=list)
    """Free text: what was written, greedily, after each of ``m`` distinct contexts."""
    references: list[list[str]] = field(default_factory=list)
    """The targets of all rows with that context ``[m]``."""
    firsts: list[int] = field(default_factory=list)
    """The first row with that context ``[m]``."""

    def rows(self, indices: Sequence[int]) -> Outcome:
        """Those of some rows of classes."""
        assert self.probabilities is not None
        return Outcome(
            [self.truth[i] for i in indices],
            [self.target_tokens[i] for i in indices],
            [self.logprobs[i] for i in indices],
            self.probabilities[list(indices)],
        )

    def rebalanced(self, biases: Sequence[float]) -> Outcome:
        """The same with a bias for each class ``[C]``; a target's own log-probability stays."""
        table = self.probabilities
        return self if table is None else replace(self, probabilities=rebalanced(table, biases))

    @property
    def matches(self) -> Floats:
        """1 where a written text is one of its references ``[m]``."""
        return exact_matches(self.texts, self.references)


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
        groups = by_context(examples)
        texts = greedy_texts(backbone, prompt, examples, groups, progress)
        references = [list(dict.fromkeys(examples[i].text for i in g)) for g in groups]
        return Outcome([], tokens, logprobs, None, texts, references, [g[0] for g in groups])
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


def by_context(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the rows of each distinct context, in order: data-to-text sets give an input several targets."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.context, []).append(i)
    return list(groups.values())


def greedy_texts(
    backbone: Backbone, prompt: SoftPrompt, examples: Sequence[Example], groups: Sequence[Sequence[int]],
    progress: Progress,
) -> list[str]:  # fmt: skip
    """What is written after the context of each group, white space at the ends aside; several processes divide them.

    A text ends with the end token, or when it has as many tokens as the longest target.
    """
    sampling = Sampling(max_new_tokens=max(len(e.target) for e in examples))

    def write(share: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = []
        tell = scaled(progress, sum(map(len, share)), len(examples))
        for at in range(0, len(share), BATCH):
            batch = share[at : at + BATCH]
            ids = generate(backbone, prompt, [examples[g[0]].context for g in batch], sampling)
            texts += [t.strip() for t in backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)]
            tell(sum(map(len, batch)))
        return texts

    return backbone.world.divided(groups, write)


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    """The rows of several outcomes as one (the held-out rows of all folds)."""
    starts = np.cumsum([0, *(len(o.logprobs) for o in outcomes)]).tolist()
    return Outcome(
        [t for o in outcomes for t in o.truth],
        [t for o in outcomes for t in o.target_tokens],
        [x for o in outcomes for x in o.logprobs],
        None if outcomes[0].probabilities is None else np.concatenate([o.probabilities for o in outcomes]),
        [t for o in outcomes for t in o.texts],
        [r for o in outcomes for r in o.references],
        [start + i for start, o in zip(starts, outcomes, strict=False) for i in o.firsts],
    )


def scores_of(outcome: Outcome, classes: Sequence[str]) -> dict[str, Any]:
    """All scores of an outcome with their intervals; loss and perplexity are over target tokens of all rows."""
    loss = token_loss(outcome.logprobs, outcome.target_tokens)
    if outcome.probabilities is not None:
        scores = classification_scores(outcome.truth, outcome.probabilities, classes)
    else:
        scores = {"n": len(outcome.logprobs), **text_scores(outcome.texts, outcome.references)}
    scores["intervals"].update(loss.pop("intervals"))
    return {**scores, **loss}


def validation_scores(outcome: Outcome) -> dict[str, float]:
    """Loss over target tokens, and accuracy and macro-F1 or exact match: no intervals."""
    loss = {"loss": -sum(outcome.logprobs) / sum(outcome.target_tokens)}
    if outcome.probabilities is not None:
        return {**loss, **point_scores(outcome.truth, outcome.probabilities)}
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
