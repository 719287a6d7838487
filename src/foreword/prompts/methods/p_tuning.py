"""P-tuning: an encoder writes the rows (Liu et al. 2021, arXiv 2103.10385)."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.errors import ForewordError, nearest
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.methods.fresh import linear, lstm

ENCODERS = ("mlp", "lstm")


class PTuning(Method):
    """Trained inputs ``[P, H]`` through an encoder with the shapes of PEFT's; only its output is stored.

    The encoder's weights are random, so it does not hand on the rows it starts from. They set two things:
    the direction of its inputs, and the size of its output.
    """

    peft_type = "P_TUNING"
    default_lr = 0.001  # 0.01 learns nothing (docs/log.md)

    def __init__(self, start: Start, config: PromptConfig, generator: torch.Generator) -> None:
        super().__init__()
        width = start.values.shape[1]
        size = config.encoder_size or width
        # Paper and PEFT feed N(0, 1) inputs. Real embeddings are smaller (root mean square 0.14 in SmolLM2-135M):
        # the biases then outweigh them and all rows come out alike (mean cosine 0.92 from the MLP, 0.995 from
        # the LSTM; at unit scale 0.54 and 0.90).
        self.embedding = nn.Parameter(start.values / _scale(start.values))
        self.recurrent = _recurrent(config.encoder, width, size, generator)
        self.head = _head(config.encoder, width, size, generator)
        self._match(start.values)

    def forward(self) -> torch.Tensor:
        """See ``Method``."""
        hidden = self.embedding if self.recurrent is None else self.recurrent(self.embedding)[0]
        rows: torch.Tensor = self.head(hidden)
        return rows

    @torch.no_grad()
    def _match(self, values: torch.Tensor) -> None:
        # torch's initialisation shrinks what passes through (the LSTM's rows have a sixth of the norm of real
        # embeddings). A factor on the last layer makes up for it and leaves PEFT's forward pass as it is.
        factor = _scale(values) / _scale(self())
        for parameter in self.head[-1].parameters():
            parameter.mul_(factor)


def _scale(values: torch.Tensor) -> float:
    """Root mean square of all entries; 1 where all are 0, which no factor can change."""
    return float(values.square().mean().sqrt()) or 1.0


def _recurrent(encoder: str, width: int, size: int, generator: torch.Generator) -> nn.LSTM | None:
    if encoder not in ENCODERS:
        fix = nearest(encoder, ENCODERS) or f"known: {', '.join(ENCODERS)}"
        raise ForewordError(f"unknown encoder '{encoder}'", "key prompt.encoder", fix)
    return lstm(width, size, generator) if encoder == "lstm" else None


def _head(encoder: str, width: int, size: int, generator: torch.Generator) -> nn.Sequential:
    widths = (2 * size, 2 * size, width) if encoder == "lstm" else (width, size, size, width)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [linear(inputs, outputs, generator), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
