"""Who carries out the trainings of a search: this process, the processes of torchrun, or a Ray cluster.

The search itself is the same for all of them. Trainings know nothing of each other, so nothing is sent but a task on
the way there and its outcome on the way back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console

from foreword.backbone.load import load_backbone
from foreword.config import Recipe
from foreword.errors import ForewordError
from foreword.jobs.candidates import Done, Task, Workshop
from foreword.jobs.data import Splits
from foreword.parallel.world import World

RAY_KEY = "key tune.ray"


class Crew(Protocol):
    """Carries out tasks."""

    workers: int
    """Tasks at a time."""

    def results(self, tasks: Sequence[Task], folder: Path) -> Iterator[tuple[int, Done]]:
        """Each task's index and outcome, as soon as it is there; what is begun is kept in ``folder`` where it can."""


class OneByOne:
    """This process; or all of torchrun's together, where none has the whole backbone."""

    workers = 1

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop

    def results(self, tasks: Sequence[Task], folder: Path) -> Iterator[tuple[int, Done]]:
        """See ``Crew``."""
        for i, task in enumerate(tasks):
            yield i, self._workshop.carry_out(task, folder / task.name)


class Ranks:
    """The processes of torchrun, each with a copy of the backbone and tasks of its own."""

    def __init__(self, workshop: Workshop, world: World) -> None:
        self._workshop, self._world, self.workers = workshop, world, world.layout.processes

    def results(self, tasks: Sequence[Task], folder: Path) -> Iterator[tuple[int, Done]]:
        """See ``Crew``; one task a process, then all tell each other."""
        for at in range(0, len(tasks), self.workers):
            turn = tasks[at : at + self.workers]
            mine = None
            if self._world.rank < len(turn):
                mine = self._workshop.carry_out(turn[self._world.rank], folder / turn[self._world.rank].name)
            found = self._world.told(mine)
            yield from ((at + i, done) for i, done in enumerate(found[: len(turn)]) if done)


class RayWorkers:
    """Actors on a Ray cluster, each with a backbone.

    Args:
        recipe: the search.
        splits: its rows.
        address: of the cluster; ``auto`` finds the one that runs here, ``local`` starts one.
        workers: how many; 0: one a GPU, or without any one a machine.

    Raises:
        ForewordError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, recipe: Recipe, splits: Splits, address: str, workers: int) -> None:
        ray = _ray(address)
        resources = ray.cluster_resources()
        gpus, machines = int(resources.get("GPU", 0)), len(ray.nodes())
        self.workers = workers or gpus or machines
        share = {"num_gpus": gpus / self.workers} if gpus else {}
        cpus = max(1, int(resources.get("CPU", 1)) // self.workers)
        actor = ray.remote(num_cpus=cpus, **share)(_Remote)
        rows = ray.put(splits)
        self._actors = [actor.remote(recipe, rows, cpus) for _ in range(self.workers)]

    def results(self, tasks: Sequence[Task], folder: Path) -> Iterator[tuple[int, Done]]:
        """See ``Crew``; whoever is free takes the next task."""
        from ray.util import ActorPool

        def send(actor: Any, task: tuple[int, Task]) -> Any:
            return actor.carry_out.remote(*task)

        yield from ActorPool(self._actors).map_unordered(send, list(enumerate(tasks)))


class _Remote:
    """One actor: the backbone is loaded once, trainings write where nobody looks."""

    def __init__(self, recipe: Recipe, splits: Splits, threads: int) -> None:
        torch.set_num_threads(threads)
        self._workshop = Workshop(recipe, splits, load_backbone(recipe.model), Console(quiet=True))

    def carry_out(self, number: int, task: Task) -> tuple[int, Done]:
        """The task's outcome."""
        with tempfile.TemporaryDirectory() as aside:
            return number, self._workshop.carry_out(task, Path(aside) / "training")


def _ray(address: str) -> Any:
    """Ray, connected to the cluster."""
    try:
        import ray
    except ImportError:
        raise ForewordError("Ray is not installed", RAY_KEY, "pip install 'foreword[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as e:
            first = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            fix = "ray start --head on one machine, or tune.ray=local"
            raise ForewordError(f"no Ray cluster at '{address}': {first}", RAY_KEY, fix) from None
    return ray
