"""How processes share the work, in words such as ``tp=2,fsdp=4``; no torch is needed to read them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from foreword.errors import ForewordError, nearest

KEY = "key train.parallel"


@dataclass(frozen=True)
class Layout:
    """Numbers of processes, whose product is all there are.

    Args:
        ddp: copies of the backbone, each read by rows of its own (data parallel).
        fsdp: processes that a copy's weights are spread over, each with rows of its own (FSDP2; with ``ddp``: HSDP).
        tp: processes that read the same rows, each computing a part of every layer (tensor parallel).
    """

    ddp: int = 1
    fsdp: int = 1
    tp: int = 1

    @property
    def processes(self) -> int:
        """All there are."""
        return self.ddp * self.fsdp * self.tp

    @property
    def readers(self) -> int:
        """Groups of processes that read different rows."""
        return self.ddp * self.fsdp

    @property
    def sharded(self) -> bool:
        """Whether no process has the whole backbone, so that all must run it together."""
        return self.fsdp * self.tp > 1

    def __str__(self) -> str:
        """As in ``train.parallel``."""
        sizes = {"ddp": self.ddp, "fsdp": self.fsdp, "tp": self.tp}
        return ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "ddp=1"


def own_rank() -> int:
    """Number of this process among those of torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def parse_layout(text: str, processes: int) -> Layout:
    """The layout of so many processes; what the text leaves open is data parallel.

    Raises:
        ForewordError: it cannot be read, or is for another number of processes.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = part.partition("=")
        if name not in ("ddp", "fsdp", "tp") or name in sizes or not size.isdecimal() or int(size) < 1:
            fix = nearest(name, ("ddp", "fsdp", "tp")) or "such as tp=2,fsdp=4; what is left out is data parallel"
            raise ForewordError(f"train.parallel is '{text}': '{part}' is no size", KEY, fix)
        sizes[name] = int(size)
    given = Layout(**sizes)
    if "ddp" not in sizes and processes % given.processes == 0:
        given = Layout(processes // given.processes, given.fsdp, given.tp)
    if given.processes != processes:
        what = f"train.parallel={text} is for {given.processes} processes, and there are {processes}"
        raise ForewordError(what, KEY, f"torchrun --nproc-per-node {given.processes} -m foreword train ...")
    return given
