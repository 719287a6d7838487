"""Context-aware prompt tuning: worked examples whose rows move a little (Blau et al. 2024, arXiv 2410.17222).

The prompt is the embeddings of labelled examples. A token's type counts on from example to example and says
by its remainder modulo 4 what it is (PEFT's numbering): 1 the template around the input, 2 the input, 3 the template
around the label, 0 the label; type 0 itself is none of them. Labels never move: they are also trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.prompts.methods.base import Method, Start

REFERENCE_WIDTH = 2048
"""The width for which ``prompt.epsilon`` is given; a ball's radius grows with the root of the width (PEFT)."""


class ContextAware(Method):
    """Frozen rows plus a trained change ``[P, H]``, each token's within a ball of its type's radius."""

    peft_type = "CPT"
    default_lr = 0.01
    embedding: torch.Tensor
    radius: torch.Tensor

    def __init__(self, start: Start, config: PromptConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("embedding", start.values.clone())
        self.register_buffer("radius", radii(start.token_types, start.values.shape[1], config))
        self.delta = nn.Parameter(torch.zeros_like(start.values))

    def forward(self) -> torch.Tensor:
        """See ``Method``. The mask keeps the gradient from tokens that may not move."""
        return self.embedding + self.delta * (self.radius > 0)

    @torch.no_grad()
    def project(self) -> None:
        """Shortens every change that has left its ball; no look at the values, so that a graph can record it."""
        norm = self.delta.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.delta.dtype).tiny)
        self.delta.mul_((self.radius / norm).clamp_max(1))


def radii(token_types: Sequence[int], width: int, config: PromptConfig) -> torch.Tensor:
    """How far each token may move, ``[P, 1]``: 0 for labels and tokens without a type."""
    by_part = (0.0, config.format_epsilon, config.epsilon, config.format_epsilon)
    epsilons = torch.tensor([[by_part[t % 4] if t > 0 else 0.0] for t in token_types])
    return epsilons * math.sqrt(width / REFERENCE_WIDTH)


def label_targets(token_ids: Sequence[int], token_types: Sequence[int], decay: float) -> list[tuple[int, int, float]]:
    """What the loss over the labels in the context asks: ``(index of the row that predicts, token id, weight)``.

    Labels of the last example weigh 1, those of each example before ``decay`` times that of the next. PEFT counts the
    label of the training row behind the context as the last: with it, multiply all of these by ``decay``.
    """
    labels = [i for i, kind in enumerate(token_types) if i > 0 and kind > 0 and kind % 4 == 0]
    latest_first = sorted({token_types[i] for i in labels}, reverse=True)
    weights = {kind: decay**age for age, kind in enumerate(latest_first)}
    return [(i - 1, token_ids[i], weights[token_types[i]]) for i in labels]
