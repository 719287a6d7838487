"""Scores of written texts: exact match, BLEU and chrF (sacrebleu's), ROUGE-L, each with its interval over texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from foreword.evaluation.intervals import Floats, Ints, interval
from foreword.evaluation.metrics import share_interval
from foreword.evaluation.rouge import rouge_l

Statistic = Callable[[Ints], float]
"""Of the texts at these indices."""


def exact_matches(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """1 where a text is one of its references, white space at the ends aside ``[m]``."""
    hits = [t.strip() in {r.strip() for r in own} for t, own in zip(texts, references, strict=True)]
    return np.asarray(hits, dtype=float)


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """All scores of ``m`` texts, with their intervals over texts.

    Args:
        texts: what was written; may be empty.
        references: for each text its references, at least one.

    Returns:
        ``exact_match`` and ``rouge_l`` in [0, 1] (the best reference counts), ``bleu`` and ``chrf`` in [0, 100]
        (corpus scores; BLEU takes n-grams of all references), sacrebleu's ``signatures``, and ``intervals``.
    """
    from sacrebleu.metrics.bleu import BLEU  # 0.1 s, and only free text needs it
    from sacrebleu.metrics.chrf import CHRF

    exact = exact_matches(texts, references)
    rouge = np.asarray([rouge_l(t, own) for t, own in zip(texts, references, strict=True)])
    bleu, chrf = BLEU(), CHRF()
    statistics = {
        "bleu": _corpus(bleu, texts, references),
        "chrf": _corpus(chrf, texts, references),
        "rouge_l": _mean(rouge),
    }
    everything = np.arange(len(texts))
    return {
        "contexts": len(texts),
        "exact_match": float(exact.mean()),
        **{name: of(everything) for name, of in statistics.items()},
        "signatures": {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())},
        "intervals": {
            "exact_match": share_interval(exact > 0),
            **{name: interval(len(texts), of) for name, of in statistics.items()},
        },
    }


def _mean(values: Floats) -> Statistic:
    return lambda i: float(values[i].mean())


def _corpus(metric: Any, texts: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """A sacrebleu score of the texts at some indices.

    Counts of n-grams are taken once a text and summed for every resample, as sacrebleu's own bootstrap does;
    that one reports only a mean and a half-width, ours the percentiles of the same resamples as all other scores.
    """
    streams = list(zip_longest(*references))  # None: this text has fewer references
    counts = np.asarray(metric._extract_corpus_statistics(list(texts), streams))

    return lambda i: float(metric._compute_score_from_stats(counts[i].sum(0).tolist()).score)
