"""The processes of tests/test_parallel.py: parallel_worker.py MODEL (COUNT PORT JOBS)...

So many processes at a time do the jobs of a JSON file, one after the other. They are forks of this one, which has
imported everything once and called nothing that starts a thread; else they are as torchrun would start them. A job is
{"out": folder, "verb": "train" or "tune", ...keyword arguments}; with "stop" the last process wants to stop after so
many steps, with "slow" the first one dawdles for so many seconds in each of a search's trainings. The first one leaves
in sent.json what it sent in its steps, and in read.json how many rows it scored at a time.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import foreword
from foreword.backbone.load import load_backbone
from foreword.config import ModelConfig
from foreword.evaluation import scoring
from foreword.jobs import training
from foreword.jobs.candidates import Workshop
from foreword.training.engine import Eager

torch.set_num_threads(1)


@contextmanager
def counted(sent: list[list[int]]) -> Iterator[None]:
    """Inside, every collective of an engine's step is noted as the bytes it gives away."""
    step, now = Eager.step, [False]
    whole = {name: getattr(dist, name) for name in ("all_reduce", "broadcast", "all_gather", "reduce_scatter_tensor")}

    def counting_step(self: Eager) -> Any:
        sent.append([])
        now[0] = True
        try:
            return step(self)
        finally:
            now[0] = False

    def noted(name: str) -> Any:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if now[0]:
                sent[-1].append(tensor.numel() * tensor.element_size())
            return whole[name](tensor, *args, **kwargs)

        return call

    Eager.step = counting_step  # type: ignore[method-assign]
    for name in whole:
        setattr(dist, name, noted(name))
    try:
        yield
    finally:
        Eager.step = step  # type: ignore[method-assign]
        for name, call in whole.items():
            setattr(dist, name, call)


@contextmanager
def noting(read: list[int]) -> Iterator[None]:
    """Inside, the number of rows is noted that this process scores at a time."""
    whole = scoring._score_own

    def note(backbone: Any, prompt: Any, contexts: Any, *more: Any) -> Any:
        read.append(len(contexts))
        return whole(backbone, prompt, contexts, *more)

    scoring._score_own = note
    try:
        yield
    finally:
        scoring._score_own = whole


@contextmanager
def dawdling(seconds: float) -> Iterator[None]:
    """Inside, the first process is so much slower than the others, who give up what takes half of that."""
    whole = Workshop.carry_out

    def carry_out(self: Workshop, *args: Any) -> Any:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds / 2))
        time.sleep(0 if dist.get_rank() else seconds)
        return whole(self, *args)

    Workshop.carry_out = carry_out  # type: ignore[method-assign]
    try:
        yield
    finally:
        Workshop.carry_out = whole  # type: ignore[method-assign]
        distributed_c10d._set_pg_timeout(dist.default_pg_timeout)


@contextmanager
def stopping(after: int) -> Iterator[None]:
    """Inside, the last process is interrupted after so many steps."""
    asked = iter(range(1, after + 1))

    @contextmanager
    def interruptible() -> Iterator[Any]:
        yield lambda: dist.get_rank() == dist.get_world_size() - 1 and next(asked, after) == after

    whole, training.interruptible = training.interruptible, interruptible
    try:
        yield
    finally:
        training.interruptible = whole


def work(jobs: Path) -> None:
    """What one process does."""
    dist.init_process_group("gloo")
    for job in json.loads(jobs.read_text()):
        verb = getattr(foreword, job.pop("verb"))
        sent: list[list[int]] = []
        first = os.environ["RANK"] == "0"
        if stop := job.pop("stop", 0):
            with pytest.raises(KeyboardInterrupt), stopping(stop), counted(sent):
                verb(quiet=True, **job)
            if first:
                (Path(job["out"]) / "stopped.json").write_text(json.dumps(len(sent)))
            continue
        read: list[int] = []
        with counted(sent), noting(read), dawdling(slow) if (slow := job.pop("slow", 0)) else nullcontext():
            verb(quiet=True, **job)
        if first:
            (Path(job["out"]) / "sent.json").write_text(json.dumps(sent))
            (Path(job["out"]) / "read.json").write_text(json.dumps(read))


def fork(rank: int, count: int, port: str, jobs: Path) -> int:
    """Another process, its number."""
    if pid := os.fork():
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    try:
        work(jobs)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    load_backbone(ModelConfig(sys.argv[1]))
    for count, port, jobs in zip(*[iter(sys.argv[2:])] * 3, strict=True):
        pids = [fork(rank, int(count), port, Path(jobs)) for rank in range(int(count))]
        failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
        if failed:
            sys.exit(1)


main()
