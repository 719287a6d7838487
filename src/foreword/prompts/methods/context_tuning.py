"""Context tuning: the keys and values that reading worked examples leaves (Lu et al. 2025, arXiv 2507.04221).

In-context learning is where training starts: few-shot examples are read once, and what the model kept of them is
trained on. The paper hides a row's own example while it is learnt, lest it be looked up; here a soft prompt is trained
on the rows that it does not show, which asks nothing of the attention mask, and members of a population show
different ones.
"""

from __future__ import annotations

from typing import ClassVar

from foreword.prompts.methods.prefix_tuning import PrefixTuning

TOKENS = 256
"""Virtual tokens unless some are asked for, and no more than a share of what the model reads at once."""
WINDOW_SHARE = 0.25


class ContextTuning(PrefixTuning):
    """``P * W`` numbers, trained as they are. Small steps: its start is good already (docs/log.md)."""

    default_lr: ClassVar[float] = 0.003
    shows_rows: ClassVar[bool] = True


def own_tokens(window: int) -> int:
    """Virtual tokens where a recipe does not say how many, for a model that reads ``window``."""
    return max(1, min(TOKENS, int(window * WINDOW_SHARE)))
