"""Steps in a few static shapes, so that they can be compiled, and replayed as CUDA graphs.

A run's passes have many widths; they are padded up to a few buckets chosen to pad least. The
index tensors of the steps ahead go to the device in one copy; a step then copies its own into
the bucket's static buffer, device to device, and replays. Nothing waits for the device.

Where CUDA graphs run, a bucket's first pass is a real one: it warms up what capturing must find
ready. Capturing itself computes nothing, so no state has to be saved for it.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from foreword.backbone.layout import Packed
from foreword.backbone.load import Backbone
from foreword.config import TrainConfig
from foreword.training.engine import Batches, Figures, accumulate, advance, update
from foreword.training.optim import capturable, keep_on_device
from foreword.training.passes import Pass, Reader, Shape
from foreword.training.state import State

BUCKETS = 4
MULTIPLE = 16
"""Widths are rounded up to it: the tile of a matrix product."""
Replay = Callable[[], None]
Recorder = Callable[[Replay], Replay]
"""Turns work on static tensors into something cheaper that does the same again."""


def choose_widths(widths: Sequence[int], buckets: int = BUCKETS, multiple: int = MULTIPLE) -> list[int]:
    """At most ``buckets`` widths, multiples of ``multiple``, that pad the given ones least in all."""
    rounded = sorted(-(-w // multiple) * multiple for w in widths)
    distinct = sorted(set(rounded))
    counts = [rounded.count(w) for w in distinct]
    n = len(distinct)

    def padded(first: int, last: int) -> int:
        """Tokens when the widths from ``first`` to ``last`` share a bucket."""
        return distinct[last - 1] * sum(counts[first:last])

    # least[b][i]: fewest tokens of the i smallest widths in b buckets, and where the last bucket began
    least: list[list[tuple[float, int]]] = [[(0.0, 0), *[(float("inf"), 0)] * n]]
    for _ in range(min(buckets, n)):
        before = least[-1]
        least.append([(0.0, 0), *(min((before[j][0] + padded(j, i), j) for j in range(i)) for i in range(1, n + 1))])
    chosen, i = [], n
    for row in reversed(least[1:]):
        if i:
            chosen.append(distinct[i - 1])
            i = row[i][1]
    return sorted(chosen)


def flatten(part: Pass, shape: Shape) -> torch.Tensor:
    """A pass padded to a shape as one row of numbers ``[F]``, in the order ``view`` reads them."""
    r, n, m = shape
    rows, width, _ = part.shape
    keep = part.row.keep // width * n + part.row.keep % width  # the rows got wider
    grid = [t for t in (part.row.ids, part.row.positions, part.row.end) if t is not None]
    lists = (keep, part.row.targets, part.owner, part.count)
    return torch.cat(
        [F.pad(t, (0, n - width, 0, r - rows)).flatten() for t in grid]
        + [F.pad(t, (0, m - len(t))) for t in lists]
        + [F.pad(part.members, (0, r - rows))]
    )


def view(flat: torch.Tensor, shape: Shape, packed: bool, cached: int = 0) -> Pass:
    """What ``flatten`` wrote, as views into the same memory; ``cached`` tokens of a prefix stand before it."""
    r, n, m = shape
    sizes = [r * n] * (3 if packed else 1) + [m] * 4 + [r]
    *grid, keep, targets, owner, count, members = torch.split(flat, sizes)
    ids, positions, end = (*(g.view(r, n) for g in grid), None, None)[:3]
    assert ids is not None
    place = torch.arange(m, device=flat.device)  # training predicts one target at a place
    return Pass(Packed(ids, keep, place, targets, positions, end, cached), owner, count, members)


class Static:
    """Steps padded to static shapes, each shape's work recorded once.

    Args:
        backbone: the frozen model, its layers compiled or not.
        reader: how batches become passes.
        config: the optimisation.
        captured: record work as CUDA graphs; else the static shapes alone.
    """

    def __init__(self, backbone: Backbone, reader: Reader, config: TrainConfig, captured: bool) -> None:
        self.backbone, self.reader, self.config, self.captured = backbone, reader, config, captured
        self.record: Recorder = as_it_is
        self.states: Sequence[State] = ()
        self.shapes: list[Shape] = []
        self.steps: deque[list[tuple[Shape, torch.Tensor, int]]] = deque()
        self.work: dict[Shape, tuple[torch.Tensor, Replay]] = {}
        self.losses = self.norms = torch.zeros(0)
        self.update: Replay = lambda: None

    def load(self, states: Sequence[State], steps: Iterable[Batches]) -> None:
        """See ``Engine``."""
        if [id(s) for s in states] != [id(s) for s in self.states]:
            self._start(states)
        read = [self.reader.read(batches) for batches in steps]
        self._plan_shapes([part.shape for passes in read for part in passes])
        host: list[torch.Tensor] = []
        index = []
        for passes in read:
            shapes = [self._fit(part.shape) for part in passes]
            host += [flatten(part, shape) for part, shape in zip(passes, shapes, strict=True)]
            index.append([(shape, part.row.ids.numel()) for part, shape in zip(passes, shapes, strict=True)])
        block = torch.cat(host)
        if self.backbone.device.type == "cuda":
            block = block.pin_memory()
        on_device = iter(torch.split(block.to(self.backbone.device, non_blocking=True), [len(h) for h in host]))
        self.steps = deque([(shape, next(on_device), tokens) for shape, tokens in step] for step in index)

    def step(self) -> Figures:
        """See ``Engine``."""
        fed = 0
        for shape, flat, tokens in self.steps.popleft():
            if shape not in self.work:
                self.work[shape] = self._build(shape)
            buffer, replay = self.work[shape]
            buffer.copy_(flat)
            replay()
            fed += tokens
        self.update()
        figures = Figures(self.losses.clone(), self.norms.clone(), fed)
        self.losses.zero_()
        advance(self.states)
        return figures

    def _start(self, states: Sequence[State]) -> None:
        """New members (some stopped, or the first): everything recorded was for the others."""
        self.states, self.work, self.shapes = list(states), {}, []
        device = self.backbone.device
        self.losses, self.norms = torch.zeros(len(states), device=device), torch.zeros(len(states), device=device)
        for state in states:
            for parameter in state.parameters:
                parameter.grad = torch.zeros_like(parameter)

        def work() -> None:
            self.norms.copy_(update(self.states, self.config))
            for state in self.states:
                state.optimizer.zero_grad(set_to_none=False)

        if self.captured:
            self.record = cuda_recorder()  # the pool of the graphs before went with them
        whole = self.captured and all(capturable(s.optimizer) for s in states)
        if whole:
            for state in states:
                keep_on_device(state.optimizer)
        self.update = self.record(work) if whole else work

    def _build(self, shape: Shape) -> tuple[torch.Tensor, Replay]:
        """The static buffer of a shape and its recorded forward and backward."""
        packed = self.reader.layout == "packed"
        size = shape.rows * shape.width * (3 if packed else 1) + 4 * shape.targets + shape.rows
        buffer = torch.zeros(size, dtype=torch.long, device=self.backbone.device)
        part = view(buffer, shape, packed, self.reader.cached)

        def work() -> None:
            self.losses.add_(accumulate(self.backbone, self.states, part, self.config))

        return buffer, self.record(work)

    def _plan_shapes(self, found: Sequence[Shape]) -> None:
        """Shapes for what the known ones do not hold: several at first, later one for all that is larger."""
        missing = [s for s in found if self._held(s) is None]
        buckets = 1 if self.shapes else BUCKETS
        for rows in sorted({s.rows for s in missing}):
            mine = [s for s in missing if s.rows == rows]
            widths = choose_widths([s.width for s in mine], buckets)
            for low, width in zip([0, *widths], widths, strict=False):
                targets = max(s.targets for s in mine if low < s.width <= width)
                self.shapes.append(Shape(rows, width, -(-targets // MULTIPLE) * MULTIPLE))

    def _held(self, shape: Shape) -> Shape | None:
        """The smallest known shape that holds a pass."""
        fits = [
            s for s in self.shapes if s.rows == shape.rows and s.width >= shape.width and s.targets >= shape.targets
        ]
        return min(fits, default=None)

    def _fit(self, shape: Shape) -> Shape:
        held = self._held(shape)
        assert held is not None, "planned before"
        return held


def as_it_is(work: Replay) -> Replay:
    """Records nothing: the static shapes alone."""
    return work


def cuda_recorder() -> Recorder:
    """Records work as CUDA graphs that share one memory pool.

    The first call runs the work (on the stream it will be captured on), the second captures and
    replays it, later ones replay.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    pool = torch.cuda.graph_pool_handle()

    def record(work: Replay) -> Replay:
        graph: Any = None
        warm = False

        def replay() -> None:
            nonlocal graph, warm
            if not warm:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream), warnings.catch_warnings():
                    # torch's, at a step that can be captured and is not: the next one is
                    warnings.filterwarnings("ignore", message=".*capturable=True.*")
                    work()
                torch.cuda.current_stream().wait_stream(stream)
                warm = True
                return
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    work()
            graph.replay()

        return replay

    return record
