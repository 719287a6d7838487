"""The processes of a run: which one this is, and what they tell each other through ``torch.distributed``.

The backbone's own communication is transformers' (``DistributedConfig``). Here is only what a frozen backbone leaves
to do: one sum of the soft prompts' gradients a step. A wrapper such as DistributedDataParallel would send the same
bytes; its buckets and overlap are for gradients a thousand times larger, and it does not know populations.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from foreword.errors import ForewordError
from foreword.parallel.layout import Layout, own_rank, parse_layout

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class World:
    """This process among all; alone by default.

    Processes are numbered as transformers numbers them: neighbours share rows (``tp``), then weights (``fsdp``).
    """

    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    tp_group: Any = None
    """Of the processes that read the same rows as this one; None without tensor parallelism."""
    slow_group: Any = None
    """Of all, for what may take as long as a training: there a process that hangs is not given up."""
    patient: bool = False
    """Whether words go through ``slow_group``."""

    @property
    def waiting(self) -> World:
        """The same, where somebody may be busy for longer than a collective may take."""
        return replace(self, patient=True)

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.layout.processes > 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def reader(self) -> int:
        """Number of the group that reads this process's rows."""
        return self.rank // self.layout.tp

    @property
    def slice(self) -> int:
        """Number of the part of every layer that this process computes."""
        return self.rank % self.layout.tp

    def rows(self, batch: Sequence[T], reader: int | None = None) -> Sequence[T]:
        """The rows of a batch that this process reads, or another reader: all of them read each row once."""
        return batch[self.reader if reader is None else reader :: self.layout.readers]

    def add_up(self, tensor: torch.Tensor, partial: bool = False) -> torch.Tensor:
        """The sum over all readers, the same bits in every process.

        Args:
            tensor: of this reader.
            partial: each process of a reader has a part of it, not the same.
        """
        if not self.several:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total if partial or self.layout.tp == 1 else total / self.layout.tp

    def add_up_gradients(self, parameters: Sequence[torch.nn.Parameter], partial: bool = False) -> None:
        """Puts sums over all readers into the gradients, in one collective of all their bytes."""
        if not self.several:
            return
        mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.add_up(torch.cat([g.flatten() for g in mine]), partial)
        at = 0
        for p in parameters:
            p.grad = total[at : at + p.numel()].view_as(p)
            at += p.numel()

    def said_by_first(self, value: T) -> T:
        """What the first process says, in all of them."""
        if not self.several:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._words)
        return box[0]

    def least(self, value: int) -> int:
        """The smallest of all processes' numbers."""
        return min(self.told(value))

    def told(self, value: T) -> list[T]:
        """What each process says, in all of them."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.layout.processes
        dist.all_gather_object(found, value, group=self._words)
        return found

    def divided(self, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """What ``work`` makes of each item, its share done by each reader and told to the others.

        Readers that a backbone is spread over (``fsdp``) must pass through it equally often, so each does everything;
        and so does each of more readers than items.
        """
        readers = self.layout.readers
        if self.layout.fsdp > 1 or not 1 < readers <= len(items):
            return list(work(items))
        parts = self.told(work(self.rows(items)))[:: self.layout.tp]
        return [parts[i % readers][i // readers] for i in range(len(items))]

    @property
    def _words(self) -> Any:
        return self.slow_group if self.patient else None

    def joined_slices(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The whole of a tensor of which each process of a reader has an equal part along ``dim``."""
        if self.layout.tp == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.layout.tp)]
        dist.all_gather(parts, tensor.contiguous(), group=self.tp_group)
        return torch.cat(parts, dim)

    @contextmanager
    def folder(self, out: Path) -> Iterator[Path]:
        """Where this process writes: the first one to ``out``, the others where nobody looks."""
        if self.first:
            yield out
            return
        with tempfile.TemporaryDirectory() as aside:
            yield Path(aside) / "run"


ALONE = World()


@contextmanager
def joined(parallel: str, device: torch.device, minutes: float) -> Iterator[World]:
    """The world of this run, for as long as the block runs: that of torchrun, or this process alone.

    Args:
        parallel: ``train.parallel``.
        device: kind of device that all compute on.
        minutes: a collective that takes longer ends the run, as somebody is lost.

    Raises:
        ForewordError: a layout for another number of processes, or one of them is lost.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    layout = parse_layout(parallel, processes)
    if processes == 1:
        yield ALONE
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(own_device(device))
    mine = not dist.is_initialized()  # else the caller's, for several runs
    if mine:
        backend, bound = ("nccl", own_device(device)) if cuda else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes), device_id=bound)
    try:
        group = dist.new_subgroups(layout.tp)[0] if layout.tp > 1 else None  # type: ignore[no-untyped-call]
        slow = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield World(layout, dist.get_rank(), group, slow)
        dist.barrier(slow)  # the first process writes alone: however long that takes, its files are there
    except RuntimeError as e:
        raise _lost(e) or e from None
    finally:
        if mine:
            dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """This process's device of a kind: on a machine with several cards, the one of its number there."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def _lost(error: RuntimeError) -> ForewordError | None:
    """What to say of a collective that failed; None for other errors."""
    words = ("gloo", "nccl", "timed out", "connection", "peer")
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(w in text.lower() for w in words):
        return None
    first = (text.strip().splitlines() or ["no details"])[0][:200]
    fix = "the same command with --resume goes on from the last checkpoint"
    return ForewordError(f"another process ended or does not answer: {first}", f"process {own_rank()}", fix)
