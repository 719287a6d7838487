"""A backbone that no process has whole: loading its shards, and what they are together.

Sharding is transformers' own (``DistributedConfig``: FSDP2 and tensor parallel over one device mesh). Virtual tokens
pass through it as they are, since the hook stands on the embedding's output inside the model's own forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from foreword.errors import ForewordError
from foreword.parallel.layout import KEY, Layout
from foreword.parallel.world import World

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]


def sharding(layout: Layout, quantize: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that spread the weights.

    Raises:
        ForewordError: rounded weights, which cannot be spread.
    """
    if quantize != "none":
        what = f"a backbone in {quantize} is not spread over processes"
        raise ForewordError(what, KEY, "ddp alone (each process has a copy), or model.quantize=none")
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=layout.tp, fsdp_size=layout.fsdp, dp_replicate_size=layout.ddp)
    return {"distributed_config": config}


def check_heads(config: Any, layout: Layout, name: str) -> None:
    """Refuses tensor parallelism over a number of processes that does not divide the heads.

    Raises:
        ForewordError: query or key-value heads are left over.
    """
    queries = int(getattr(config, "num_attention_heads", 0) or 0)
    heads = math.gcd(queries, int(getattr(config, "num_key_value_heads", None) or queries))
    if heads % layout.tp:
        sizes = ", ".join(f"tp={n}" for n in range(1, heads + 1) if heads % n == 0)
        raise ForewordError(f"tp={layout.tp} does not divide the heads of {name}", KEY, f"{sizes}; or fsdp")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A weight in full; all processes ask for it together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_heads(layers: Layers, world: World) -> Layers:
    """Of keys and values ``[B, heads, S, head_dim]`` the heads that this process computes."""
    if world.layout.tp == 1:
        return layers
    size = layers[0][0].shape[1] // world.layout.tp
    mine = slice(world.slice * size, (world.slice + 1) * size)
    return [(keys[:, mine], values[:, mine]) for keys, values in layers]


def all_heads(layers: Layers, world: World) -> Layers:
    """All heads of keys and values of which each process has some."""
    return [(world.joined_slices(keys, 1), world.joined_slices(values, 1)) for keys, values in layers]
