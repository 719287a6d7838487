"""The training loop: plain functions over one small state.

The loss is the mean over target tokens of an optimiser step's rows, however they are split
into passes. The order of rows is a function of seed and epoch, so a resumed run needs no
generator state to read the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreword.backbone.choose import Layout
from foreword.backbone.forward import micro_batches, packed_logprobs, rows_logprobs
from foreword.backbone.load import Backbone
from foreword.backbone.virtual import VirtualTokens
from foreword.config import TrainConfig
from foreword.data.encode import common_opening
from foreword.errors import ForewordError
from foreword.records import Example, Segment
from foreword.training.checkpoint import Checkpoint, pack_optimizer, unpack_optimizer
from foreword.training.optim import build_optimizer, build_schedule

Event = Mapping[str, Any]
Callback = Callable[[Event], None]
Validate = Callable[[torch.Tensor], dict[str, float]]
"""Rows ``[P, H]`` -> scores on the validation rows (loss, accuracy, macro_f1)."""

CPU_BUDGET, GPU_BUDGET = 1024, 8192


@dataclass
class State:
    """Where training stands: everything a checkpoint holds."""

    rows: torch.nn.Parameter
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    step: int = 0
    best_rows: torch.Tensor | None = None
    best_score: float = -math.inf
    stale: int = 0
    """Validations since the best one."""
    stopped: bool = False
    seconds: float = 0.0
    """Time spent in steps, resumed ones included."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this step."""

    def checkpoint(self) -> Checkpoint:
        """The state as tensors and counters."""
        tensors, optimizer = pack_optimizer(self.optimizer)
        tensors["rows"] = self.rows
        if self.best_rows is not None:
            tensors["best_rows"] = self.best_rows
        return Checkpoint(
            tensors,
            {
                "step": self.step,
                "best_score": self.best_score if math.isfinite(self.best_score) else None,
                "stale": self.stale,
                "stopped": self.stopped,
                "seconds": self.seconds,
                "metrics_bytes": self.metrics_bytes,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
            },
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to a checkpoint of the same run."""
        tensors, state = checkpoint.tensors, checkpoint.state
        with torch.no_grad():
            self.rows.copy_(tensors["rows"])
        self.best_rows = tensors.get("best_rows")
        unpack_optimizer(self.optimizer, tensors, state["optimizer"])
        self.schedule.load_state_dict(dict(state["schedule"]))
        self.step, self.stale = state["step"], state["stale"]
        self.stopped, self.metrics_bytes = state["stopped"], state["metrics_bytes"]
        self.seconds = state["seconds"]
        self.best_score = -math.inf if state["best_score"] is None else state["best_score"]


@dataclass(frozen=True)
class Plan:
    """Sizes that follow from rows and configuration."""

    rows: int
    step_rows: int
    steps_per_epoch: int
    epochs: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * self.epochs


def make_plan(rows: int, config: TrainConfig) -> Plan:
    """Steps count the rows the recipe says: ``batch_size * accumulate`` a step."""
    step_rows = config.batch_size * config.accumulate
    return Plan(rows, step_rows, math.ceil(rows / step_rows), config.epochs)


def start(rows: torch.Tensor, config: TrainConfig, plan: Plan, device: torch.device) -> State:
    """A fresh state from initial rows ``[P, H]``; the soft prompt and its optimiser are float32."""
    parameter = torch.nn.Parameter(rows.detach().to(device, torch.float32).clone())
    optimizer = build_optimizer(parameter, config)
    return State(parameter, optimizer, build_schedule(optimizer, config, plan.steps))


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in an epoch, from a generator of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).tolist()


def train(
    backbone: Backbone,
    examples: Sequence[Example],
    state: State,
    config: TrainConfig,
    plan: Plan,
    layout: Layout,
    validate: Validate | None = None,
    on_event: Callback = lambda event: None,
    save: Callable[[State], None] = lambda state: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Trains from where the state stands to the end; returns the kept rows ``[P, H]``.

    Args:
        backbone: the frozen model.
        examples: training rows.
        state: fresh or restored; changed in place.
        config: the optimisation.
        plan: sizes of the run.
        layout: how a batch shares a forward pass.
        validate: scores rows on validation data, for best-of and early stopping.
        on_event: told every step (``{"event": "step", ...}``) and validation, as plain dicts.
        save: writes a checkpoint of the state.
        interrupted: asked after every step; when true the state is saved and
            ``KeyboardInterrupt`` is raised, so that at most the current step is lost.
    """
    opening = common_opening([e.context for e in examples])
    segments = [Segment(e.context[len(opening) :], (e.target,)) for e in examples]
    with VirtualTokens(backbone.embedding, state.rows) as virtual:
        start_ids = [*virtual.ids, *opening]
        for epoch, batch, last in _batches(plan, config.seed, state.step):
            if state.stopped:
                break
            began = time.perf_counter()
            figures = _step(backbone, start_ids, [segments[i] for i in batch], state, config, layout)
            state.step += 1
            seconds = time.perf_counter() - began
            state.seconds += seconds
            on_event(
                {
                    "event": "step", "step": state.step, "steps": plan.steps, "epoch": epoch + 1,
                    "epochs": plan.epochs, **figures, "seconds": seconds,
                }
            )  # fmt: skip
            due = last and ((epoch + 1) % config.validate_every == 0 or epoch + 1 == plan.epochs)
            if validate is not None and due:
                _validated(validate(state.rows.detach()), state, config, epoch + 1, on_event)
            stop = interrupted()
            if stop or state.stopped or state.step % config.checkpoint_every == 0 or state.step == plan.steps:
                save(state)
            if stop:
                raise KeyboardInterrupt
    kept = state.best_rows if state.best_rows is not None else state.rows
    return kept.detach().clone()


def _batches(plan: Plan, seed: int, done: int) -> Iterator[tuple[int, list[int], bool]]:
    """(epoch, row indices, whether the epoch ends here) of the steps not yet done."""
    for epoch in range(done // plan.steps_per_epoch, plan.epochs):
        order = epoch_order(plan.rows, seed, epoch)
        first = done - epoch * plan.steps_per_epoch if epoch == done // plan.steps_per_epoch else 0
        for i in range(first, plan.steps_per_epoch):
            batch = order[i * plan.step_rows : (i + 1) * plan.step_rows]
            yield epoch, batch, i == plan.steps_per_epoch - 1


def _step(
    backbone: Backbone,
    opening: Sequence[int],
    batch: Sequence[Segment],
    state: State,
    config: TrainConfig,
    layout: Layout,
) -> dict[str, float]:
    """One optimiser step over a batch; returns its loss, gradient norm, tokens and learning rate."""
    budget = config.token_budget or (CPU_BUDGET if backbone.device.type == "cpu" else GPU_BUDGET)
    targets = sum(len(b) for s in batch for b in s.branches)
    state.optimizer.zero_grad(set_to_none=True)
    losses: list[torch.Tensor] = []
    fed = 0
    for at in range(0, len(batch), config.batch_size):
        rows = batch[at : at + config.batch_size]
        for part in micro_batches(rows, len(opening), budget):
            chosen = [rows[i] for i in part]
            with _autocast(backbone, config):
                logprobs = (packed_logprobs if layout == "packed" else rows_logprobs)(backbone, opening, chosen)
            loss = -logprobs.sum() / targets
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            fed += len(opening) + sum(s.tokens for s in chosen)
    clip = config.clip if config.clip > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_([state.rows], clip)
    value, size = float(torch.stack(losses).sum()), float(norm)
    if not math.isfinite(value) or not math.isfinite(size):
        raise ForewordError(
            f"the loss or its gradient is not finite (loss {value}, gradient norm {size})",
            f"step {state.step + 1}",
            "lower train.lr, set train.clip=1, or model.dtype=float32",
        )
    rate = float(state.schedule.get_last_lr()[0])
    state.optimizer.step()
    state.schedule.step()
    return {"loss": value, "grad_norm": size, "lr": rate, "tokens": fed}


def _autocast(backbone: Backbone, config: TrainConfig) -> torch.autocast:
    device = backbone.device.type
    able = device == "cuda" and torch.cuda.is_bf16_supported() and backbone.dtype == torch.float32
    on = config.autocast == "on" or (config.autocast == "auto" and able)
    return torch.autocast(device, dtype=torch.bfloat16, enabled=on)


def _validated(scores: dict[str, float], state: State, config: TrainConfig, epoch: int, on_event: Callback) -> None:
    """Keeps the best rows so far and counts how long ago that was."""
    score = -scores["loss"] if config.select == "loss" else scores[config.select]
    better = score > state.best_score
    if better:
        state.best_score, state.best_rows, state.stale = score, state.rows.detach().clone(), 0
    else:
        state.stale += 1
    state.stopped = bool(config.patience) and state.stale >= config.patience
    on_event({"event": "validation", "step": state.step, "epoch": epoch, "best": better, **scores})
