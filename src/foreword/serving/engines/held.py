"""Soft prompts of an engine that sends their rows along with every request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from foreword.serving.engine import EngineRefused, Rows, UnknownPrompt


class HeldRows:
    """Rows by key, checked and in the engine's dtype.

    Args:
        vocab_size: ids from here on are virtual.
        hidden_size: width of a row, ``H``.
        dtype: the engine's.
        room: most bytes of all of them.
    """

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, room: int) -> None:
        self.vocab_size, self.hidden_size, self.dtype, self.room = vocab_size, hidden_size, dtype, room
        self._rows: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        return sum(r.nbytes for r in self._rows.values())

    def put(self, rows: Rows) -> None:
        """Takes a soft prompt in. Raises EngineRefused for what cannot be run."""
        if rows.key in self._rows:
            return
        if rows.kind != "rows":
            raise EngineRefused(f"soft prompts of kind {rows.kind} can't be served with vLLM: it has no place for them")
        if rows.values.ndim != 2 or rows.values.shape[1] != self.hidden_size or not len(rows.values):
            raise EngineRefused(f"soft prompt {rows.key} has shape {rows.values.shape}, not [P, {self.hidden_size}]")
        taken = torch.from_numpy(np.array(rows.values, dtype=np.float32)).to(self.dtype)
        if not torch.isfinite(taken).all():  # vLLM would answer with garbage and no error
            raise EngineRefused(f"soft prompt {rows.key} has values that are not finite in {self.dtype}")
        if self.nbytes + taken.nbytes > self.room:
            raise EngineRefused(
                f"no room for soft prompt {rows.key}: {taken.nbytes} bytes beside {self.nbytes} of {self.room}"
            )
        self._rows[rows.key] = taken

    def drop(self, key: str) -> None:
        """Forgets a soft prompt; requests that run took its rows with them."""
        self._rows.pop(key, None)

    def find(self, key: str | None, ids: Sequence[int]) -> torch.Tensor | None:
        """The rows ``[P, H]`` that local ids name; None where they name none. Raises EngineRefused or UnknownPrompt."""
        if not ids or min(ids) < 0:
            raise EngineRefused("a request needs at least one token id, none of them negative")
        rows = None if key is None else self._rows.get(key)
        if key is not None and rows is None:
            raise UnknownPrompt(f"soft prompt {key} is not loaded")
        if max(ids) < self.vocab_size:
            return None
        if rows is None:
            raise EngineRefused("virtual ids without a soft prompt")
        if max(ids) >= self.vocab_size + len(rows):
            raise EngineRefused(f"soft prompt {key} has {len(rows)} rows")
        return rows

    def place(self, ids: Sequence[int], rows: torch.Tensor, under_text: torch.Tensor) -> torch.Tensor:
        """``[n, H]``: a row under each virtual id, ``under_text`` (``[n, H]`` or ``[1, H]``) under the others."""
        own = torch.tensor(ids)
        virtual = (own >= self.vocab_size)[:, None]
        return torch.where(virtual, rows[(own - self.vocab_size).clamp(min=0)], under_text)
