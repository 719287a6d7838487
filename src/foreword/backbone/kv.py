"""Keys and values as a soft prompt: their geometry, PEFT's flat order, and the cache that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from foreword.errors import ForewordError

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of every layer, each ``[B, heads, S, head_dim]``."""


@dataclass(frozen=True)
class Geometry:
    """What one token leaves in the cache: ``layers`` times keys and values of ``heads`` x ``head_dim``.

    ``heads`` are key-value heads (fewer than the query's under GQA, one under MQA).
    """

    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Numbers a token, ``W = L * 2 * heads * head_dim``."""
        return self.layers * 2 * self.heads * self.head_dim

    def flat(self, layers: Layers) -> torch.Tensor:
        """One row's cache as ``[S, W]``, in the order in which PEFT stores a prefix."""
        parts = [part for keys, values in layers for part in (keys[0], values[0])]  # each [heads, S, head_dim]
        return torch.stack(parts).permute(2, 0, 1, 3).reshape(parts[0].shape[1], self.width)

    def layered(self, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Prefixes ``[B, S, W]`` layer by layer, as a cache holds them."""
        b, s, _ = values.shape
        parts = values.view(b, s, self.layers * 2, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return [(parts[2 * i], parts[2 * i + 1]) for i in range(self.layers)]


def probed(model: Any, name: str) -> Geometry:
    """The geometry of a model's cache, from what a forward pass over one token leaves in it.

    Raises:
        ForewordError: a recurrent model, or layers that share or differ in their keys and values.
    """
    from transformers import DynamicCache

    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    fix = "use prompt.method=prompt-tuning, whose rows every model reads"
    if getattr(model, "_is_stateful", False):
        raise ForewordError(f"{config.model_type} is recurrent and has no keys and values", name, fix)
    left = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]], device=model.device), past_key_values=left, use_cache=True)
    shapes = {tuple(part.shape) for layer in left.layers for part in (layer.keys, layer.values)}
    shared = getattr(config, "num_kv_shared_layers", None)
    if len(left.layers) != layers or len(shapes) != 1 or shared:
        raise ForewordError(
            f"the layers of {config.model_type} share or differ in keys and values, which a prefix cannot hold",
            name,
            fix,
        )
    ((_, heads, _, head_dim),) = shapes
    return Geometry(layers, heads, head_dim)


def cache_of(layers: Layers) -> Any:
    """A cache that holds the layers; what a forward pass reads is appended to it.

    Every layer keeps all: our own masks do the windows.
    """
    from transformers import DynamicCache

    held = DynamicCache()
    for i, (keys, values) in enumerate(layers):
        held.update(keys, values, i)
    return held


def lasting_cache(layers: Layers) -> Any:
    """A cache that answers with its layers in front of what is read and keeps nothing of it.

    So a layer may run twice, as it does when activations are recomputed for the backward pass.
    """
    from transformers.cache_utils import Cache

    made = []
    for keys, values in layers:
        layer = _lasting_layer()()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        made.append(layer)
    return Cache(layers=made)


@cache
def _lasting_layer() -> Any:
    """The class of one layer of such a cache; made when first needed, as transformers is imported then."""
    from transformers.cache_utils import DynamicLayer

    class Lasting(DynamicLayer):  # type: ignore[misc]
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)

    return Lasting
