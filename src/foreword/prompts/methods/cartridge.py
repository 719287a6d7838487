"""Cartridges: a trained prefix with a frozen beginning (Eyuboglu et al. 2025, arXiv 2506.06266)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.errors import ForewordError
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.soft import Kind


class Cartridge(Method):
    """Keys and values ``[P, W]`` of which the first ``prompt.frozen_tokens`` tokens stay as they are.

    The paper freezes the first token, where attention with nothing to look at goes (the attention sink).
    """

    kind: ClassVar[Kind] = "prefix"
    peft_type = "CARTRIDGE"
    default_lr = 0.01
    frozen: torch.Tensor

    def __init__(self, start: Start, config: PromptConfig, generator: torch.Generator) -> None:
        super().__init__()
        tokens, fixed = len(start.values), config.frozen_tokens
        if not 0 <= fixed < tokens:
            what = f"{fixed} of {tokens} virtual tokens frozen leaves nothing to train"
            raise ForewordError(what, "key prompt.frozen_tokens", f"give 0 to {tokens - 1}")
        self.register_buffer("frozen", start.values[:fixed].clone())
        self.trained = nn.Parameter(start.values[fixed:].clone())

    def forward(self) -> torch.Tensor:
        """See ``Method``."""
        return torch.cat([self.frozen, self.trained])
