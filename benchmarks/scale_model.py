"""What one training step costs on many GPUs, from counts: memory, bytes sent, and seconds. Nothing is run here.

The counts are those that benchmarks/scale.py finds in real steps; tests/test_benchmarks_scale.py compares them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from foreword.parallel.layout import Layout

ACTIVATIONS = 16
"""Numbers a token, layer and hidden unit keep for the backward pass of a Llama-like layer."""
RECOMPUTED = 2
"""The same where only each layer's input is kept and its gradient comes back."""


@dataclass(frozen=True)
class Shape:
    """A Llama-like backbone: its sizes, and bytes a weight."""

    name: str
    layers: int
    hidden: int
    inner: int
    key_values: int
    """Width of keys, and of values."""
    vocab: int
    heads: int = 8
    """Heads of keys and values."""
    tied: bool = False
    """Whether the LM head is the embedding."""
    width: int = 2
    queries: int = 0
    """Width of the queries; 0: the hidden width."""

    @property
    def layer(self) -> int:
        """Parameters of one layer: four projections of attention, three of the MLP, two norms."""
        queries = self.queries or self.hidden
        return self.hidden * (2 * queries + 2 * self.key_values + 3 * self.inner + 2)

    @property
    def table(self) -> int:
        """Parameters of the embedding."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All there are."""
        return self.layers * self.layer + self.table * (1 if self.tied else 2) + self.hidden


@dataclass(frozen=True)
class Step:
    """What one reader reads in a step.

    Args:
        tokens: fed in one pass, virtual ones included.
        targets: places in it where the LM head runs.
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
        flops: a second that a process reaches in matrix products.
        inside, across: bytes a second that a process sends within a machine, and between machines.
        summing: the same within a machine where tensors are summed; 0: as ``inside``.
        latency: seconds of the smallest collective, for each doubling of its processes.
        per_machine: processes of a machine.
        memory: bytes a process has.
        overlaps: whether it computes while weights are gathered.
    """

    name: str
    flops: float
    inside: float
    across: float
    latency: float
    per_machine: int
    memory: float = math.inf
    summing: float = 0.0
    overlaps: bool = True


class Collective(NamedTuple):
    """So many calls of one kind; ``size``: bytes of the whole tensor; ``over`` so many processes out of ``span``."""

    kind: str
    size: int
    calls: int
    over: int
    span: int

    @property
    def sent(self) -> float:
        """Bytes that one process sends, in a ring."""
        share = (self.over - 1) / self.over
        return self.calls * self.size * share * (2 if self.kind == "all_reduce" else 1)

    def seconds(self, machine: Machine) -> float:
        """Time of all calls."""
        inside = machine.summing if machine.summing and self.kind == "all_reduce" else machine.inside
        speed = inside if self.span <= machine.per_machine else machine.across
        return self.sent / speed + self.calls * machine.latency * math.log2(self.over)


def gradients(step: Step, layout: Layout) -> list[Collective]:
    """The one sum of a step that is Foreword's: of what is trained, in float32."""
    many = layout.processes
    return [Collective("all_reduce", 4 * step.trained, 1, many, many)] if many > 1 else []


def gathers(shape: Shape, step: Step, layout: Layout) -> list[Collective]:
    """FSDP2: layers and an embedding of its own on the way there and back; norm and head stay once they are there."""
    if layout.fsdp == 1:
        return []

    def gather(parameters: int, norms: int, calls: int) -> Collective:
        size = (parameters // layout.tp + norms) * shape.width  # tensor parallelism leaves norms whole
        return Collective("all_gather", size, calls * step.passes, layout.fsdp, layout.fsdp * layout.tp)

    layer = gather(shape.layer - 2 * shape.hidden, 2 * shape.hidden, 2 * shape.layers)
    return [layer, gather(shape.table, 0, 1 if shape.tied else 2), gather(shape.table, shape.hidden, 1)]


def sums(shape: Shape, step: Step, layout: Layout) -> list[Collective]:
    """Tensor parallel: two sums a layer on the way there, and one for each of five projections on the way back."""
    if layout.tp == 1:
        return []

    def call(kind: str, numbers: int, calls: int) -> Collective:
        return Collective(kind, numbers * shape.width, calls * step.passes, layout.tp, layout.tp)

    layer = 7 + (2 if step.recompute else 0)
    return [
        call("all_reduce", step.tokens * shape.hidden, 1 + layer * shape.layers),
        call("all_reduce", step.targets * shape.hidden, 1),
        call("all_gather", step.targets * shape.vocab, 1),
    ]


def memory(shape: Shape, step: Step, layout: Layout) -> float:
    """Bytes of one process: its weights, of FSDP2 what is gathered at a time, and activations."""
    weights = shape.parameters / (layout.fsdp * layout.tp)
    gathered = (2 * shape.layer + shape.table) / layout.tp if layout.fsdp > 1 else 0.0
    kept = RECOMPUTED if step.recompute else ACTIVATIONS
    activations = step.tokens * shape.hidden * shape.layers * kept / layout.tp
    return (weights + gathered + activations) * shape.width + 16 * step.trained


def flops(shape: Shape, step: Step, layout: Layout) -> float:
    """Of one process: forward, and backward in the activations alone, as no weight has a gradient."""
    layers = (6 if step.recompute else 4) * shape.layers * shape.layer * step.tokens
    return (layers + 4 * step.targets * shape.table) * step.passes / layout.tp


def seconds(shape: Shape, step: Step, layout: Layout, machine: Machine) -> float:
    """Time of a step: weights are gathered while others compute, a sum is waited for."""
    computing = flops(shape, step, layout) / machine.flops
    gathering = sum(c.seconds(machine) for c in gathers(shape, step, layout))
    summing = sum(c.seconds(machine) for c in (*sums(shape, step, layout), *gradients(step, layout)))
    return (max(computing, gathering) if machine.overlaps else computing + gathering) + summing


def share(step: Step, rows: int, layout: Layout, budget: int) -> Step:
    """What a reader has of a batch of so many rows, where ``step`` is one row: passes of at most ``budget`` tokens."""
    mine = math.ceil(rows / layout.readers)
    at_once = min(mine, max(1, budget // step.tokens))
    return replace(step, tokens=step.tokens * at_once, targets=step.targets * at_once, passes=math.ceil(mine / at_once))


def layouts(processes: int, heads: int, per_machine: int) -> Iterator[Layout]:
    """All layouts of so many processes; tensor parallelism stays inside a machine and divides the heads."""
    sizes = [2**i for i in range(processes.bit_length())]
    for tp, fsdp in itertools.product(sizes, sizes):
        if tp * fsdp <= processes and tp <= per_machine and heads % tp == 0:
            yield Layout(processes // (tp * fsdp), fsdp, tp)


def best(
    shape: Shape, row: Step, rows: int, processes: int, machine: Machine, budget: int
) -> tuple[float, Layout, Step] | None:
    """The fastest layout and size of a pass, up to ``budget`` tokens, that fit the memory; None: none fits.

    Returns:
        seconds a step, the layout, and what a reader reads.
    """
    found = []
    budgets = [budget // 2**i for i in range(6)]
    for layout in layouts(processes, shape.heads, machine.per_machine):
        for recompute, pass_tokens in itertools.product((False, True), budgets):
            step = share(replace(row, recompute=recompute), rows, layout, pass_tokens)
            if memory(shape, step, layout) <= machine.memory:
                found.append((seconds(shape, step, layout, machine), layout, step))
    return min(found, key=lambda f: (f[0], f[1].tp, f[1].fsdp)) if found else None
