"""Residual prompt tuning: rows plus a small network of them (Razdaibiedina et al. 2023, arXiv 2305.03937)."""

from __future__ import annotations

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.methods.fresh import linear, zeroed

BOTTLENECK = 128
"""Hidden size unless ``prompt.encoder_size`` says otherwise."""


class Residual(Method):
    """``rows + network(rows)``, ``[P, H]``; one network (down, ReLU, up, layer norm) for all tokens.

    PEFT reads the sum as a PROMPT_TUNING prompt. The layer norm starts at 0, so the first output is the start
    itself and a text stays that text. Its gain gets a gradient in the first step, the layers below from the
    second on. (Zeros in the up-projection instead would be normalised: a division by almost nothing.)
    """

    default_lr = 0.01

    def __init__(self, start: Start, config: PromptConfig, generator: torch.Generator) -> None:
        super().__init__()
        width, size = start.values.shape[1], config.encoder_size or BOTTLENECK
        self.rows = nn.Parameter(start.values.clone())
        self.network = nn.Sequential(
            linear(width, size, generator),
            nn.ReLU(),
            linear(size, width, generator),
            zeroed(nn.LayerNorm(width)),
        )

    def forward(self) -> torch.Tensor:
        """See ``Method``."""
        rows: torch.Tensor = self.rows + self.network(self.rows)
        return rows
