"""How a step runs: as it is (eager), or in static shapes that can be compiled and replayed.

On a GPU a step of a small model is bound by kernel launches: 9.7 ms replayed where 90 ms eager,
4.2 ms compiled and replayed (SmolLM2-135M shape on an H100). Which engine pays depends on how
many steps there are to earn its preparation back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from foreword.backbone.attach import together
from foreword.backbone.forward import run
from foreword.backbone.load import Backbone
from foreword.config import TrainConfig
from foreword.errors import ForewordError
from foreword.records import Segment
from foreword.training.passes import Pass, Reader
from foreword.training.state import State

EngineName = Literal["eager", "graph", "compile"]
Batches = Sequence[Sequence[Segment]]
"""A step's rows, for each member who trains."""

CPU_BUDGET, GPU_BUDGET = 1024, 16384

LAUNCH_SECONDS = 0.32e-3
"""A layer's share of a replayed step where launches bind (9.7 ms for 30 layers on an H100)."""
FLOPS = 2e14
"""What a large step reaches on such a card, FLOP/s in bfloat16."""
GRAPH_STEPS = 20
"""Capturing takes about as long as so many eager steps."""
COMPILE_SECONDS = 60.0
"""A compiled step takes about half the time; compiling costs 28 to 110 s."""


@dataclass(frozen=True)
class Figures:
    """What a step leaves, on the device until somebody looks.

    ``loss`` (of this process's rows) and ``norm`` (of the whole gradient, before clipping) ``[K]``; ``tokens`` fed.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    tokens: int


class Engine(Protocol):
    """Runs the steps of the members who train."""

    def load(self, states: Sequence[State], steps: Iterable[Batches]) -> None:
        """Takes the rows of the next steps, all for the same members."""

    def step(self) -> Figures:
        """Runs the next of them: forward, backward, clipping, optimiser and schedule."""


class Eager:
    """Every step as it is."""

    def __init__(self, backbone: Backbone, reader: Reader, config: TrainConfig) -> None:
        self.backbone, self.reader, self.config = backbone, reader, config
        self.states: Sequence[State] = ()
        self.steps: list[Batches] = []

    def load(self, states: Sequence[State], steps: Iterable[Batches]) -> None:
        """See ``Engine``."""
        self.states, self.steps = states, list(steps)

    def step(self) -> Figures:
        """See ``Engine``."""
        world = self.backbone.world
        passes = self.reader.read(self.steps.pop(0), world)
        for state in self.states:
            state.optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros(len(self.states), device=self.backbone.device)
        for part in passes:
            losses += accumulate(self.backbone, self.states, part, self.config)
        # Of a prefix a process computes its own heads' gradient; of rows all that read the same have the same.
        partial = self.states[0].method.kind == "prefix"
        world.add_up_gradients([p for s in self.states for p in s.parameters], partial)
        norm = update(self.states, self.config)
        advance(self.states)
        return Figures(losses, norm, sum(p.row.ids.numel() for p in passes))


def accumulate(backbone: Backbone, states: Sequence[State], part: Pass, config: TrainConfig) -> torch.Tensor:
    """Forward and backward of one pass; returns each member's share of its loss ``[K]``."""
    losses = pass_losses(backbone, states, part, config)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    return losses.detach()


def pass_losses(backbone: Backbone, states: Sequence[State], part: Pass, config: TrainConfig) -> torch.Tensor:
    """Forward of one pass: each member's share of its loss ``[K]``, with the graph behind it."""
    values = [s.method() for s in states]
    part = part.to(backbone.device)
    with together(backbone, values, states[0].method.kind, part.members) as prefix, _autocast(backbone, config):
        logprobs = run(backbone, part.row, prefix)
    return part.losses(logprobs, len(states))


def update(states: Sequence[State], config: TrainConfig) -> torch.Tensor:
    """Clips and applies each member's gradient; returns their norms before clipping ``[K]``."""
    clip = config.clip if config.clip > 0 else math.inf
    norms = []
    for state in states:
        norms.append(torch.nn.utils.clip_grad_norm_(state.parameters, clip))
        state.optimizer.step()
        state.method.project()
    return torch.stack(norms)


def advance(states: Sequence[State]) -> None:
    """The learning rates of the next step."""
    for state in states:
        state.schedule.step()
        state.step += 1


def token_budget(config: TrainConfig, device: torch.device) -> int:
    """Most tokens of one pass."""
    return config.token_budget or (CPU_BUDGET if device.type == "cpu" else GPU_BUDGET)


def choose_engine(name: str, device: torch.device, steps: int, tokens: int, layers: int, parameters: int) -> EngineName:
    """The engine a run gets.

    Args:
        name: of ``train.engine``.
        device: where the backbone lies.
        steps: steps still to do.
        tokens: of one step, all members together.
        layers: of the backbone.
        parameters: of the backbone.

    Raises:
        ForewordError: CUDA graphs are asked for elsewhere.
    """
    if name == "graph" and device.type != "cuda":
        raise ForewordError("graph needs a CUDA device", "key train.engine", "train.engine=auto")
    if name != "auto":
        return name  # type: ignore[return-value]
    if device.type != "cuda" or steps < GRAPH_STEPS:
        return "eager"
    # 4: forward and the backward pass in activations, two FLOPs each a parameter and token
    replayed = max(LAUNCH_SECONDS * layers, 4 * parameters * tokens / FLOPS)
    return "compile" if steps * replayed / 2 > COMPILE_SECONDS else "graph"


def _autocast(backbone: Backbone, config: TrainConfig) -> torch.autocast:
    device = backbone.device.type
    able = device == "cuda" and torch.cuda.is_bf16_supported() and backbone.dtype == torch.float32
    on = config.autocast == "on" or (config.autocast == "auto" and able)
    return torch.autocast(device, dtype=torch.bfloat16, enabled=on)
