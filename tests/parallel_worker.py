"""What one process of torchrun does in tests/test_parallel.py: the jobs of a JSON file, one after the other.

A job is {"out": folder, "verb": "train" or "tune", ...keyword arguments}. ``FOREWORD_COUNT`` names a file for what
the first process sent in its steps.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import foreword
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


def main() -> None:
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        verb = getattr(foreword, job.pop("verb"))
        sent: list[list[int]] = []
        with counted(sent):
            verb(quiet=True, **job)
        if os.environ["RANK"] == "0":
            (Path(job["out"]) / "sent.json").write_text(json.dumps(sent))


main()
