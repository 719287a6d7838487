"""Knowing a backbone again: shape facts and a few weights, the same in any dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from foreword.backbone.offload import fetched
from foreword.backbone.shards import whole

PROBES = 64
TOLERANCE = 2**-7
"""bfloat16 keeps 8 significant bits, so a weight moves by 2^-9 of itself at most; twice that for both sides."""


@dataclass(frozen=True)
class Fingerprint:
    """What the sidecar stores of a backbone. ``probe`` holds weights at fixed places."""

    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    probe: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return {**asdict(self), "probe": list(self.probe)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Fingerprint:
        """Reads what ``as_dict`` wrote."""
        return cls(
            str(d["model_type"]),
            int(d["hidden_size"]),
            int(d["vocab_size"]),
            int(d["num_layers"]),
            tuple(float(x) for x in d["probe"]),
        )

    def differs(self, other: Fingerprint) -> str:
        """The first difference in words, or an empty string when it is the same backbone."""
        for name in ("model_type", "hidden_size", "vocab_size", "num_layers"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {theirs}, not {mine}"
        same = len(self.probe) == len(other.probe) and all(
            abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + 1e-6 for a, b in zip(self.probe, other.probe, strict=True)
        )
        return "" if same else "its weights are others (another checkpoint of this shape)"


def fingerprint(model: nn.Module, config: Any) -> Fingerprint:
    """Fingerprint of a loaded model; reads 64 numbers, so it costs nothing.

    Half of the probes lie in the embedding table, half in the one-dimensional weights (norms
    and biases) from the first layer to the last: these are never quantised.
    """
    table = whole(fetched(model.get_input_embeddings(), "weight").detach())  # type: ignore[operator]
    flat = table.reshape(-1)
    half = PROBES // 2
    values = flat[_spread(flat.numel(), half).to(flat.device)].float().tolist()
    vectors = [n for n, p in sorted(model.named_parameters()) if p.dim() == 1 and p.is_floating_point()]
    for i in _spread(len(vectors), min(half, len(vectors))).tolist():
        owner, _, name = vectors[i].rpartition(".")
        v = whole(fetched(model.get_submodule(owner), name).detach())
        values.append(v[v.numel() // 2].float().item())
    text = config.get_text_config()
    return Fingerprint(str(text.model_type), table.shape[1], table.shape[0], int(text.num_hidden_layers), tuple(values))


def _spread(size: int, count: int) -> torch.Tensor:
    """``count`` indices spread over ``range(size)``."""
    return torch.arange(count) * (size - 1) // max(count - 1, 1)
