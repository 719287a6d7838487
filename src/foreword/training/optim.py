"""Optimisers and schedules by name: torch's and transformers' own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from foreword.backbone.quantise import quiet_import
from foreword.config import TrainConfig
from foreword.errors import ForewordError, nearest


def build_optimizer(parameters: Sequence[torch.nn.Parameter], config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """The optimiser over one soft prompt's parameters; AdamW as in the guide by default."""
    known: dict[str, Any] = {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    known.pop("lbfgs", None)  # needs a closure that evaluates the loss several times a step
    known.pop("sparseadam", None)  # takes sparse gradients only
    cls = known.get(config.optimizer.lower())
    if cls is None:
        raise ForewordError(
            f"unknown optimiser '{config.optimizer}'",
            "key train.optimizer",
            nearest(config.optimizer, known) or f"known: {', '.join(sorted(known))}",
        )
    accepted = inspect.signature(cls).parameters
    kwargs: dict[str, Any] = {"weight_decay": config.weight_decay} if "weight_decay" in accepted else {}
    optimizer: torch.optim.Optimizer = cls(list(parameters), lr=lr, **kwargs)
    return optimizer


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule over ``steps`` optimiser steps: a function of the step alone."""
    with quiet_import():
        from transformers import SchedulerType, get_scheduler

    names = [s.value for s in SchedulerType]
    if config.schedule not in names:
        raise ForewordError(
            f"unknown schedule '{config.schedule}'",
            "key train.schedule",
            nearest(config.schedule, names) or f"known: {', '.join(names)}",
        )
    fix = "linear, cosine, polynomial, constant, ..."
    try:
        schedule = get_scheduler(
            config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps
        )
    except (ValueError, TypeError) as e:
        raise ForewordError(
            f"the schedule needs more settings: {e}", f"train.schedule={config.schedule}", fix
        ) from None
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        raise ForewordError("the schedule follows a metric, not the step", f"train.schedule={config.schedule}", fix)
    return schedule


def rate(schedule: torch.optim.lr_scheduler.LambdaLR) -> float:
    """The learning rate of the next step, without asking the device for it."""
    return float(schedule.base_lrs[0]) * float(schedule.lr_lambdas[0](schedule.last_epoch))


def capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step can be captured in a CUDA graph."""
    return all("capturable" in group for group in optimizer.param_groups)


def keep_on_device(optimizer: torch.optim.Optimizer) -> None:
    """Puts learning rate and counters where a captured step reads and writes them.

    The schedule's own base rate stays a number, so that a new rate is filled in without waiting.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device
        group["capturable"] = True
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
    for entry in optimizer.state.values():
        entry |= {k: v.to(device) for k, v in entry.items() if isinstance(v, torch.Tensor)}
