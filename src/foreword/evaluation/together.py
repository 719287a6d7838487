"""What several soft prompts say together: the mean of their probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from foreword.evaluation.evaluate import Outcome


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
