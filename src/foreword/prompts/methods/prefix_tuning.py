"""Prefix tuning: keys and values of every layer (Li & Liang 2021, arXiv 2101.00190)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.methods.fresh import linear, zeroed
from foreword.prompts.soft import Kind

HIDDEN = 512
"""Width of the projection unless ``prompt.encoder_size`` says otherwise: the paper's for table-to-text."""


class PrefixTuning(Method):
    """``P * W`` numbers, trained as they are, or with ``prompt.projection`` written by a network.

    With a projection the start is a constant and the network adds to it: trained inputs ``[P, E]``, linear, tanh,
    linear to ``[P, W]``, as in the paper. Its last layer starts at 0, so the first output is the start itself
    (keys and values the model made of real tokens), which the paper's random network cannot give. PEFT stores
    the sum only.
    """

    kind: ClassVar[Kind] = "prefix"
    peft_type = "PREFIX_TUNING"
    default_lr: ClassVar[float] = 0.01
    """Two classes and few rows overfit at 0.03, which six classes want (docs/log.md)."""
    values: torch.Tensor

    @classmethod
    def rate(cls, config: PromptConfig) -> float:
        """See ``Method``: a network wants smaller steps than what it writes (docs/log.md)."""
        return 0.0005 if config.projection else cls.default_lr

    def __init__(self, start: Start, config: PromptConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.projection: Projection | None = None
        if config.projection:
            self.register_buffer("values", start.values.clone())
            self.projection = Projection(start.values.shape, config.encoder_size or HIDDEN, generator)
        else:
            self.values = nn.Parameter(start.values.clone())

    def forward(self) -> torch.Tensor:
        """See ``Method``."""
        return self.values if self.projection is None else self.values + self.projection()


class Projection(nn.Module):
    """A network's keys and values ``[P, W]``, 0 at the start."""

    def __init__(self, shape: torch.Size, size: int, generator: torch.Generator) -> None:
        super().__init__()
        tokens, width = shape
        # N(0, 1): torch's default for an embedding, as in the paper's code and PEFT.
        self.embedding = nn.Parameter(torch.randn(tokens, size, generator=generator))
        self.transform = nn.Sequential(
            linear(size, size, generator),
            nn.Tanh(),
            zeroed(linear(size, width, generator)),
        )

    def forward(self) -> torch.Tensor:
        """What is added to the start."""
        values: torch.Tensor = self.transform(self.embedding)
        return values
