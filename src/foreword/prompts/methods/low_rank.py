"""Decomposed prompt tuning: rows as a product of two thin matrices (Xiao et al. 2023, arXiv 2310.10094)."""

from __future__ import annotations

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.prompts.methods.base import Method, Start


class LowRank(Method):
    """``left [P, r] @ right [r, H]``: ``r * (P + H)`` numbers instead of ``P * H``; PEFT reads the product.

    Starts at the best approximation of that rank to the rows it is given (Eckart and Young 1936), not at
    random factors: with ``r = P`` that is the rows themselves.
    """

    def __init__(self, start: Start, config: PromptConfig, generator: torch.Generator) -> None:
        super().__init__()
        left, right = best_factors(start.values, min(config.rank, *start.values.shape))
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    def forward(self) -> torch.Tensor:
        """See ``Method``."""
        return self.left @ self.right


def best_factors(values: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The truncated singular value decomposition of ``[P, H]`` as two factors ``[P, r]``, ``[r, H]``.

    The columns of the left factor have one length, also where a singular value is 0 (a short text tiled over
    ``P`` tokens has as many others as tokens): with a root of each singular value on either side, such a
    column and its row would both be 0, their gradients too, and that rank would be lost for good.
    """
    u, s, vh = torch.linalg.svd(values.double(), full_matrices=False)
    length = float(s[:rank].mean().sqrt()) or 1.0
    left, right = u[:, :rank] * length, s[:rank, None] * vh[:rank] / length
    return left.to(values.dtype), right.to(values.dtype)
