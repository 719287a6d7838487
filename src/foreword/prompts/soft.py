"""A soft prompt as a value: what a frozen model is given to read, however it was trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["rows", "prefix"]
"""``rows``: virtual tokens at the input embedding. ``prefix``: keys and values of every layer."""


@dataclass(frozen=True)
class SoftPrompt:
    """``P`` virtual tokens.

    ``values`` is ``[P, W]``: for ``rows`` the embeddings themselves, ``W = H``; for ``prefix`` each
    token's keys and values, ``W = L * 2 * heads * head_dim`` in PEFT's order (layer 0 keys, layer 0
    values, layer 1 keys, ...), keys as they lie in the cache (already rotated).
    """

    values: torch.Tensor
    kind: Kind = "rows"

    @property
    def tokens(self) -> int:
        """Number of virtual tokens, ``P``: positions it takes in front of or among the text."""
        return int(self.values.shape[0])

    @property
    def virtual_ids(self) -> int:
        """Ids it takes in the input: ``P`` for rows, none for a prefix, which lies in the cache."""
        return self.tokens if self.kind == "rows" else 0

    def to(self, device: torch.device) -> SoftPrompt:
        """The same on a device."""
        return SoftPrompt(self.values.to(device), self.kind)
