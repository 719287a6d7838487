"""What all methods have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.prompts.soft import Kind, SoftPrompt


@dataclass(frozen=True)
class Start:
    """What a method starts from.

    ``values`` ``[P, W]`` float32: rows at the embedding, or a prefix's keys and values (``soft.py``).
    """

    values: torch.Tensor
    tasks: int = 1
    """Tasks trained at once (multitask prompt tuning)."""
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    """Task factors of a trained source: columns ``[tasks, P, r]``, rows ``[tasks, r, H]``."""
    token_ids: tuple[int, ...] = ()
    """The tokens that the rows are embeddings of (context-aware prompt tuning)."""
    token_types: tuple[int, ...] = ()
    """Their types, in PEFT's numbering (``cpt.py``)."""


class Method(nn.Module):
    """A soft prompt in training: its parameters are what the optimiser sees.

    Subclasses are built by ``Subclass(start, config, generator)`` and draw from that generator alone.
    """

    kind: ClassVar[Kind] = "rows"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    default_lr: ClassVar[float] = 0.03
    shows_rows: ClassVar[bool] = False
    """Whether it starts from some of the training rows, and trains on the others."""

    @classmethod
    def rate(cls, config: PromptConfig) -> float:
        """Its learning rate when none is given."""
        return cls.default_lr

    def forward(self) -> torch.Tensor:
        """The soft prompt's values ``[P, W]`` (``[tasks * P, H]`` where several tasks train at once)."""
        raise NotImplementedError

    def project(self) -> None:
        """Puts the parameters back where the method wants them, after an optimiser step."""

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of its adapter folder, by PEFT's names."""
        return {"prompt_embeddings": self().detach()}

    def soft_prompt(self) -> SoftPrompt:
        """What a model is given to read, apart from the graph."""
        return SoftPrompt(self().detach().clone(), self.kind)
