"""Label words from the model itself: what it finds likely behind the rows of one class and not of the others.

A class's name may be a poor answer (" no complaint" is hardly ever said); the frozen model ranks all words in one
pass over the rows. After Schick, Schmid & Schütze 2020 (arXiv 2010.13641: likelihood ratios) and Gao, Fisch & Chen
2021 (arXiv 2012.15723: only words that are likely there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from foreword.backbone.load import Backbone
from foreword.evaluation.scoring import Floats

LIKELY = 200
"""Words looked at for a class: the likeliest behind its rows."""
LEAST_ROWS = 3
"""Rows a class needs to be given a word; one with fewer keeps its name."""
FLOOR = 0.3
"""Added to a word's spread over the rows, in nats, so that few rows which agree by chance prove little."""


def next_logprobs(backbone: Backbone, contexts: Sequence[Sequence[int]]) -> Floats:
    """Log-probabilities ``[n, V]`` of the token behind each context, by the plain model."""
    rows = []
    with torch.no_grad():
        for ids in contexts:
            logits = backbone.model(input_ids=torch.tensor([list(ids)], device=backbone.device)).logits[0, -1]
            rows.append(logits[: backbone.vocab_size].float().log_softmax(-1).cpu().numpy())
    return np.stack(rows)


def learnt_words(
    logprobs: Floats, labels: Sequence[int], names: Sequence[int], usable: Callable[[int], bool]
) -> list[int]:
    """A token for each class.

    Args:
        logprobs: ``[n, V]`` of the token behind each row.
        labels: class index of each row.
        names: first token of each class's name, which stays where a class has too few rows.
        usable: whether a token may stand for a class.
    """
    truth, words = np.array(labels), list(names)
    rich = [c for c in range(len(names)) if (truth == c).sum() >= LEAST_ROWS]
    taken = {names[c] for c in range(len(names)) if c not in rich}
    if len(rich) < 2:
        return words
    spread = np.sqrt(sum(logprobs[truth == c].var(0) * (truth == c).sum() for c in rich) / len(truth))
    for c in rich:
        own, others = logprobs[truth == c].mean(0), logprobs[truth != c].mean(0)
        likely = np.argsort(-np.maximum(own, logprobs.mean(0)), kind="stable")
        found = [i for i in likely[: 4 * LIKELY].tolist() if i not in taken and usable(i)][:LIKELY]
        if found:
            score = (own - others)[found] / (spread[found] + FLOOR)
            words[c] = found[int(score.argmax())]
            taken.add(words[c])
    return words
