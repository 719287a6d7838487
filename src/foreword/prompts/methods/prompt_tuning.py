"""Prompt tuning: the rows themselves (Lester et al. 2021, arXiv 2104.08691)."""

from __future__ import annotations

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.prompts.methods.base import Method, Start


class PromptTuning(Method):
    """``P * H`` numbers, trained as they are."""

    def __init__(self, start: Start, config: PromptConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.rows = nn.Parameter(start.values.clone())

    def forward(self) -> torch.Tensor:
        """See ``Method``."""
        return self.rows
