"""Fresh layers with torch's default distributions, drawn from a given generator."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer; torch's default is uniform within ``1 / sqrt(inputs)``."""
    return _drawn(nn.Linear(inputs, outputs, device="meta"), inputs**-0.5, generator)


def lstm(inputs: int, hidden: int, generator: torch.Generator) -> nn.LSTM:
    """Two layers, both directions: ``[P, inputs] -> [P, 2 * hidden]``; uniform within ``1 / sqrt(hidden)``."""
    empty = nn.LSTM(inputs, hidden, num_layers=2, bidirectional=True, device="meta")
    return _drawn(empty, hidden**-0.5, generator)


def zeroed(layer: Layer) -> Layer:
    """The layer with all its parameters 0, so that what it adds is nothing at the start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


def _drawn(empty: Layer, bound: float, generator: torch.Generator) -> Layer:
    # On the meta device the layer's own initialisation has nothing to fill: the global generator stays as it is.
    layer = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
