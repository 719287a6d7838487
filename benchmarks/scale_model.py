"""What one training step costs on many GPUs, from counts: memory, bytes sent, and seconds. Nothing is run here.

The counts are those that benchmarks/scale.py finds in real steps (tests/test_benchmarks_scale.py compares them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from foreword.parallel.layout import Layout


@dataclass(frozen=True)
class Shape:
    """A backbone.

    Args:
        name: as in tables.
        layers, hidden, vocab: its sizes.
        layer_parameters: of one layer.
        tied: whether the LM head is the embedding.
        width: bytes a weight.
    """

    name: str
    layers: int
    hidden: int
    vocab: int
    layer_parameters: int
    tied: bool = False
    width: int = 2

    @property
    def table(self) -> int:
        """Parameters of the embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All there are."""
        return self.layers * self.layer_parameters + self.table * (1 if self.tied else 2) + self.hidden

    @property
    def multiplied(self) -> int:
        """Those that a token is multiplied by, but for the head."""
        return self.layers * self.layer_parameters


@dataclass(frozen=True)
class Step:
    """What a reader reads in one step of one soft prompt (or of a population, all members' tokens together).

    Args:
        tokens: fed in one pass, virtual ones included.
        targets: places where the LM head runs.
        trained: numbers that are learnt.
        passes: forward and backward passes.
        recompute: whether activations are computed again.
    """

    tokens: int
    targets: int
    trained: int
    passes: int = 1
    recompute: bool = False


@dataclass(frozen=True)
class Machine:
    """A cluster.

    Args:
        name: as in tables.
        flops: that a process reaches in matrix products.
        inside, across: bytes a second that a process sends within a machine, and between machines.
        latency: seconds a collective takes at least, for each doubling of its processes.
        per_machine: processes of a machine.
        memory: bytes a process has.
    """

    name: str
    flops: float
    inside: float
    across: float
    latency: float
    per_machine: int
    memory: float


class Collective(NamedTuple):
    """So many calls of one kind over so many processes; ``size``: bytes of the whole tensor."""

    kind: str
    size: int
    calls: int
    over: int

    @property
    def sent(self) -> float:
        """Bytes that one process sends, by rings."""
        share = (self.over - 1) / self.over
        return self.calls * self.size * share * (2 if self.kind == "all_reduce" else 1)


def collectives(shape: Shape, step: Step, layout: Layout) -> list[Collective]:
    """All that a step calls: the gradient's sum, gathered weights (FSDP2), summed activations (tensor parallel)."""
    found = [Collective("all_reduce", 4 * step.trained, 1, layout.processes)]
    if layout.fsdp > 1:
        found += _gathers(shape, step, layout)
    if layout.tp > 1:
        found += _sums(shape, step, layout.tp)
    return found


def _gathers(shape: Shape, step: Step, layout: Layout) -> list[Collective]:
    """Every layer on the way there and on the way back; the embedding too; norm and head stay once they are there."""
    times = (3 if step.recompute else 2) * step.passes
    part = shape.width / layout.tp

    def gather(parameters: int, calls: int) -> Collective:
        return Collective("all_gather", round(parameters * part), calls, layout.fsdp)

    layer = gather(shape.layer_parameters, shape.layers * (2 if not step.recompute else times) * step.passes)
    if shape.tied:
        return [layer, gather(shape.table + shape.hidden, step.passes)]
    return [layer, gather(shape.table, 2 * step.passes), gather(shape.table + shape.hidden, step.passes)]


def _sums(shape: Shape, step: Step, over: int) -> list[Collective]:
    """Per layer two sums on the way there, one for each of its five input projections on the way back."""
    activations = step.tokens * shape.hidden * shape.width
    layer = 2 + 5 + (2 if step.recompute else 0)
    return [
        Collective("all_reduce", activations, (1 + layer * shape.layers) * step.passes, over),
        Collective("all_reduce", step.targets * shape.hidden * shape.width, step.passes, over),
        Collective("all_gather", step.targets * shape.vocab * shape.width, step.passes, over),
    ]


def memory(shape: Shape, step: Step, layout: Layout) -> float:
    """Bytes of one process: its weights, a gathered layer and the one before it, and activations."""
    spread = layout.fsdp * layout.tp
    weights = shape.parameters * shape.width / spread
    if layout.fsdp > 1:
        weights += (2 * shape.layer_parameters + shape.table) * shape.width / layout.tp
    kept = 2 if step.recompute else ACTIVATIONS
    activations = step.tokens * shape.hidden * shape.layers * kept * shape.width / layout.tp
    return weights + activations + 12 * step.trained


ACTIVATIONS = 16
"""Numbers a token, layer and hidden unit keep for the backward pass of a Llama-like layer."""


def flops(shape: Shape, step: Step, layout: Layout) -> float:
    """Of one process: forward, and backward in the activations alone, as no weight has a gradient."""
    passes = 4 if not step.recompute else 6
    head = 4 * step.targets * shape.table
    return (passes * shape.multiplied * step.tokens + head) * step.passes / layout.tp


def seconds(shape: Shape, step: Step, layout: Layout, machine: Machine) -> float:
    """Time of a step: weights are gathered beside the computing, what is summed is waited for."""
    computing = flops(shape, step, layout) / machine.flops
    gathered = summed = 0.0
    for call in collectives(shape, step, layout):
        inner = layout.tp if call.over == layout.tp and layout.tp > 1 else call.over
        speed = machine.inside if inner <= machine.per_machine else machine.across
        took = call.sent / speed + call.calls * machine.latency * max(1.0, math.log2(max(call.over, 2)))
        if call.kind == "all_gather" and call.over == layout.fsdp and layout.fsdp > 1:
            gathered += took
        elif call.over > 1:
            summed += took
    return max(computing, gathered) + summed
