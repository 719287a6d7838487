"""Decoder layers run differently for a while: recomputed to save memory, compiled to save time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

RECOMPILE_LIMIT = 64
"""Shapes of one layer's code; beyond torch's own 8 it would go on uncompiled without a word."""


@contextmanager
def recomputed_layers(model: Any) -> Iterator[int]:
    """Inside, decoder layers keep only their inputs for the backward pass; yields how many do.

    transformers' own switch needs the layers in training mode, which turns dropout on; a frozen
    backbone stays in eval mode. So no random state has to be kept either, which a CUDA graph could not.
    """
    layers = decoder_layers(model)
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


@contextmanager
def compiled_layers(model: Any, backend: str = "inductor") -> Iterator[int]:
    """Inside, every decoder layer runs compiled; yields how many do.

    Layers share their code, so this compiles once where compiling the whole model takes as often
    as there are layers; embedding and head, with their hooks, stay as they are. Without gradients
    (validation, whose widths are many) the layers run plainly.
    """
    layers = decoder_layers(model)
    for layer in layers:
        layer.compile(dynamic=False, backend=backend)
        layer._compiled_call_impl = functools.partial(_if_training, layer._compiled_call_impl, layer._call_impl)
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield len(layers)
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def _if_training(compiled: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)


def decoder_layers(model: Any) -> list[Any]:
    """The blocks that models repeat, as transformers marks them."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
