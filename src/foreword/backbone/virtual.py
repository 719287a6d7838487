"""Virtual token ids: ids at or above the vocabulary are answered from a table of soft prompt rows.

Whatever takes ``input_ids`` then works with soft prompts (training, ``generate``, continuous
batching) and the model's own weights stay as they are. The embedding is never called outside
the root forward, which FSDP2 would not survive.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class VirtualTokens:
    """Hooks on an input embedding, in place inside a ``with`` block.

    Args:
        embedding: the module of ``model.get_input_embeddings()``.
        table: rows to answer with ``[R, H]``; id ``V + r`` is row ``r``. Gradients reach it.
    """

    def __init__(self, embedding: nn.Module, table: torch.Tensor) -> None:
        self.embedding, self.table = embedding, table
        self.base = int(embedding.num_embeddings)  # type: ignore[arg-type]
        self._ids: torch.Tensor | None = None
        self._handles: list[Any] = []

    @property
    def ids(self) -> list[int]:
        """The virtual ids of the table's rows."""
        return list(range(self.base, self.base + self.table.shape[0]))

    def __enter__(self) -> VirtualTokens:
        self._handles = [
            self.embedding.register_forward_pre_hook(self._remember),
            self.embedding.register_forward_hook(self._answer),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._ids = [], None

    def _remember(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        self._ids = ids
        return (ids.masked_fill(ids >= self.base, 0), *args[1:])

    def _answer(self, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        """``out`` is ``[B, T, H]``; rows of virtual ids are replaced, whatever scaling the module did."""
        assert self._ids is not None
        if not len(self.table):
            return out
        virtual = self._ids >= self.base
        rows = F.embedding((self._ids - self.base).clamp(min=0), self.table)
        return torch.where(virtual[..., None], rows.to(out.dtype), out)
