"""Where a training stands: one state a soft prompt, and the population that trains together."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from foreword.config import Member, TrainConfig
from foreword.prompts.methods.base import Method
from foreword.training.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from foreword.training.optim import build_optimizer, build_schedule, rate

MOST_EPOCHS, LEAST_EPOCHS, ROWS_READ = 30, 3, 3000
"""Few rows are read often; of thousands a few passes are enough."""


@dataclass(frozen=True)
class Plan:
    """Sizes and order of a run, which follow from rows and configuration alone."""

    rows: int
    step_rows: int
    steps_per_epoch: int
    epochs: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def batch(self, seed: int, step: int) -> list[int]:
        """Indices of the rows that a member of this seed reads in step ``step``, counted from 0."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return list(epoch_order(self.rows, seed, epoch)[i * self.step_rows : (i + 1) * self.step_rows])


def make_plan(rows: int, config: TrainConfig) -> Plan:
    """Steps count the rows the recipe says: ``batch_size * accumulate`` a step."""
    step_rows = config.batch_size * config.accumulate
    return Plan(rows, step_rows, math.ceil(rows / step_rows), config.epochs or epochs_for(rows))


def trained_rows(
    rows: int, shown: Sequence[Collection[int]], config: TrainConfig
) -> tuple[Plan, list[tuple[int, ...]]]:
    """The steps over the rows that are not shown, and which these are of each member; none: all rows.

    Args:
        rows: how many there are.
        shown: indices of the rows that each member shows, as many of each.
        config: batch size and epochs.
    """
    left = [tuple(i for i in range(rows) if i not in mine) for mine in shown]
    return make_plan(rows - max(map(len, shown), default=0), config), left


def epochs_for(rows: int, most: int = MOST_EPOCHS, least: int = LEAST_EPOCHS, read: int = ROWS_READ) -> int:
    """Epochs where the recipe leaves them open: about as many rows are read, whatever their number."""
    return min(most, max(least, math.ceil(read / rows)))


@lru_cache(maxsize=256)
def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of the rows in an epoch, from a generator of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())


@dataclass
class State:
    """One soft prompt in training: everything a checkpoint holds of it."""

    member: Member
    method: Method
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0
    best: dict[str, torch.Tensor] | None = None
    """The method's tensors at the best validation so far."""
    best_score: float = -math.inf
    stale: int = 0
    """Validations since the best one."""
    stopped: bool = False
    recent: float = math.nan
    """Mean training loss of the last whole epoch, per step."""
    epoch_losses: list[float] = field(default_factory=list)
    """Losses of the epoch's steps so far."""
    rows: tuple[int, ...] = ()
    """Indices of the rows it trains on, as many as the plan has; empty: all."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimiser changes."""
        return [p for p in self.method.parameters() if p.requires_grad]

    @property
    def kept(self) -> Method:
        """What this member stands for: the method at its best by validation, else the last."""
        if self.best is None:
            return self.method
        method = copy.deepcopy(self.method)
        method.load_state_dict(self.best)
        return method

    @property
    def merit(self) -> float:
        """What members are compared by, higher is better: validation where there is one, else training loss."""
        return self.best_score if self.best is not None else -self.recent

    def counters(self) -> dict[str, Any]:
        """Its numbers, JSON-safe."""
        return {
            "step": self.step,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,
            "stale": self.stale,
            "stopped": self.stopped,
            "recent": self.recent if math.isfinite(self.recent) else None,
            "epoch_losses": self.epoch_losses,
            "schedule": {**self.schedule.state_dict(), "_last_lr": [rate(self.schedule)]},
        }


@dataclass
class Population:
    """The soft prompts that train in one pass, each with its own optimiser and schedule."""

    states: list[State]
    plan: Plan
    seconds: float = 0.0
    """Time spent in steps, resumed ones included."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this point."""

    @property
    def step(self) -> int:
        """Steps done by those who went furthest."""
        return max(s.step for s in self.states)

    @property
    def training(self) -> list[State]:
        """Those who have steps to do."""
        return [s for s in self.states if not s.stopped and s.step < self.plan.steps]

    def batch(self, state: State, step: int) -> list[int]:
        """Indices of the rows that a member reads in step ``step``, counted from 0."""
        found = self.plan.batch(state.member.seed, step)
        return [state.rows[i] for i in found] if state.rows else found

    @property
    def best(self) -> int:
        """The member with the highest merit; the first of equals."""
        merits = [-math.inf if math.isnan(s.merit) else s.merit for s in self.states]
        return merits.index(max(merits))

    def checkpoint(self) -> Checkpoint:
        """All members as tensors and counters."""
        tensors: dict[str, torch.Tensor] = {}
        counters = []
        for k, state in enumerate(self.states):
            mine, optimizer = pack_optimizer(state.optimizer)
            mine |= {f"method.{name}": tensor for name, tensor in state.method.state_dict().items()}
            mine |= {f"best.{name}": tensor for name, tensor in (state.best or {}).items()}
            tensors |= {f"{k}.{name}": tensor for name, tensor in mine.items()}
            counters.append({**state.counters(), "optimizer": optimizer})
        return Checkpoint(tensors, {"seconds": self.seconds, "metrics_bytes": self.metrics_bytes, "members": counters})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to a checkpoint of the same run."""
        self.seconds, self.metrics_bytes = checkpoint.state["seconds"], checkpoint.state["metrics_bytes"]
        for k, (state, found) in enumerate(zip(self.states, checkpoint.state["members"], strict=True)):
            start = f"{k}."
            tensors = _under(start, checkpoint.tensors)
            state.method.load_state_dict(_under("method.", tensors))
            device = state.parameters[0].device
            state.best = {n: t.to(device) for n, t in _under("best.", tensors).items()} or None
            unpack_optimizer(state.optimizer, tensors, found["optimizer"])
            state.schedule.load_state_dict(dict(found["schedule"]))
            state.step, state.stale, state.stopped = found["step"], found["stale"], found["stopped"]
            state.best_score = -math.inf if found["best_score"] is None else found["best_score"]
            state.recent = math.nan if found["recent"] is None else found["recent"]
            state.epoch_losses = list(found["epoch_losses"])


def start(
    methods: Sequence[Method], members: Sequence[Member], config: TrainConfig, plan: Plan, device: torch.device,
    rows: Sequence[tuple[int, ...]] = (),
) -> Population:  # fmt: skip
    """Fresh states that begin as copies of ``methods``; soft prompts and optimisers are float32.

    Args:
        methods: before the first step, one a member.
        members: who they are.
        config: the optimisation.
        plan: sizes of the run.
        device: where they train.
        rows: of each member, what it trains on, where that is not all.
    """
    states = []
    for method, member, mine_rows in zip(methods, members, rows or [()] * len(methods), strict=True):
        mine = copy.deepcopy(method).to(device, torch.float32)
        optimizer = build_optimizer([p for p in mine.parameters() if p.requires_grad], config, member.lr)
        states.append(State(member, mine, optimizer, build_schedule(optimizer, config, plan.steps), rows=mine_rows))
    return Population(states, plan)


def _under(start: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
