"""The training loop over a population: plain functions over one small state a soft prompt.

Every member reads its own rows in its own order, and stops for itself. The order is a function of
seed and epoch, so a resumed run needs no generator state to read the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreword.config import TrainConfig
from foreword.errors import ForewordError
from foreword.parallel.world import ALONE, World
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment
from foreword.training.engine import Engine, Figures
from foreword.training.optim import rate
from foreword.training.state import Population, State

Event = Mapping[str, Any]
Callback = Callable[[Event], None]
Validate = Callable[[SoftPrompt], dict[str, float]]
"""Soft prompt -> scores on the validation rows (loss, accuracy, macro_f1)."""

AHEAD = 64
"""Steps whose rows are laid out at a time."""
SAVE_SECONDS = 1.0
SAVE_SHARE = 20
"""Times as long between checkpoints as one takes: encoders have millions of numbers."""
LOG_STEPS = 25
"""Steps between two looks at the losses on a GPU and with several processes: each look waits for them."""


@dataclass
class Hooks:
    """What a run does beside training.

    Args:
        validate: scores a soft prompt on validation data, for best-of and early stopping.
        on_event: told every step (``{"event": "step", ...}``) and validation, as plain dicts.
        save: writes a checkpoint of the population.
        interrupted: asked after every step; when true the population is saved and
            ``KeyboardInterrupt`` is raised, so that at most the current step is lost.
        world: the processes that train together.
    """

    validate: Validate | None = None
    on_event: Callback = lambda event: None
    save: Callable[[Population], None] = lambda population: None
    interrupted: Callable[[], bool] = lambda: False
    world: World = ALONE


def train(
    engine: Engine, segments: Sequence[Segment], population: Population, config: TrainConfig, hooks: Hooks
) -> None:
    """Trains from where the population stands to the end; changes it in place.

    Args:
        engine: runs the steps.
        segments: training rows without the opening they share.
        population: fresh or restored.
        config: the optimisation.
        hooks: what else happens.
    """
    log = _Log(population, hooks, every=1 if _on_cpu(population) else LOG_STEPS)
    saved, took = time.monotonic(), 0.0
    while states := population.training:
        steps = range(population.step, min(population.step + AHEAD, population.plan.steps))
        engine.load(states, ([[segments[i] for i in population.batch(s, t)] for s in states] for t in steps))
        for _ in steps:
            log.step(states, [rate(s.schedule) for s in states], engine.step())
            done = _validate(population, states, config, hooks, log)
            stop = hooks.interrupted()
            due = _due(config, population.step, time.monotonic() - saved, took)
            over = done or not population.training
            # Several processes save and stop together: after the same look, when one of them wants to.
            if over or log.full or ((stop or due) and not hooks.world.several):
                stop, due = log.flush(stop, due)
                if stop or over or due:
                    began = time.monotonic()
                    hooks.save(population)
                    saved = time.monotonic()
                    took = saved - began
                if stop:
                    raise KeyboardInterrupt
            if done:
                break  # fewer members from here on


class _Log:
    """Losses wait on the device until they are looked at, some steps together."""

    def __init__(self, population: Population, hooks: Hooks, every: int) -> None:
        self.population, self.on_event, self.world, self.every = population, hooks.on_event, hooks.world, every
        self.waiting: list[tuple[list[State], int, list[float], Figures]] = []
        self.began = time.perf_counter()

    def step(self, states: Sequence[State], rates: Sequence[float], figures: Figures) -> None:
        """Takes the figures of a step just launched."""
        self.waiting.append((list(states), states[0].step, list(rates), figures))

    @property
    def full(self) -> bool:
        """Whether it is time for a look."""
        return len(self.waiting) >= self.every

    def flush(self, *wishes: bool) -> tuple[bool, ...]:
        """Waits for the device and the other processes, and tells of the steps since the last look.

        Returns:
            which of the wishes some process has.
        """
        mine = [f.loss for *_, f in self.waiting]
        device = self.population.states[0].parameters[0].device
        total = self.world.add_up(torch.cat([*mine, torch.tensor(wishes, device=device, dtype=torch.float32)]))
        agreed = tuple(w > 0 for w in total[len(total) - len(wishes) :].tolist())
        if self.waiting:
            self._look(total[: len(total) - len(wishes)])
        return agreed

    def _look(self, sums: torch.Tensor) -> None:
        """Tells of the steps that wait; ``sums`` holds their losses, one after the other."""
        losses = iter(sums.tolist())
        seconds = (time.perf_counter() - self.began) / len(self.waiting)
        for states, step, rates, figures in self.waiting:
            self.population.seconds += seconds
            mine = [next(losses) for _ in states]
            self._tell(states, step, rates, mine, figures.norm.tolist(), figures.tokens, seconds)
        self.waiting = []
        self.skip()

    def skip(self) -> None:
        """Time from here on counts for the next step."""
        self.began = time.perf_counter()

    def _tell(
        self, states: Sequence[State], step: int, rates: Sequence[float],
        losses: Sequence[float], norms: Sequence[float], tokens: int, seconds: float,
    ) -> None:  # fmt: skip
        plan = self.population.plan
        for state, loss, norm in zip(states, losses, norms, strict=True):
            _check_finite(state, step, loss, norm)
            state.epoch_losses.append(loss)
            if step % plan.steps_per_epoch == 0:
                state.recent, state.epoch_losses = sum(state.epoch_losses) / len(state.epoch_losses), []
        event = {
            "event": "step", "step": step, "steps": plan.steps, "epoch": -(-step // plan.steps_per_epoch),
            "epochs": plan.epochs, "loss": sum(losses) / len(losses), "grad_norm": norms[0], "lr": rates[0],
            "tokens": tokens, "seconds": seconds,
        }  # fmt: skip
        if len(self.population.states) > 1:
            numbers = [self.population.states.index(s) for s in states]
            event |= {"grad_norm": list(norms), "lr": list(rates), "members": numbers, "losses": list(losses)}
        self.on_event(event)


def _validate(population: Population, states: Sequence[State], config: TrainConfig, hooks: Hooks, log: _Log) -> bool:
    """Validates at the ends of epochs; returns whether somebody stopped training."""
    epoch, inside = divmod(population.step, population.plan.steps_per_epoch)
    last = epoch == population.plan.epochs
    if hooks.validate is None or inside or not (last or epoch % config.validate_every == 0):
        return False
    log.flush()
    for state in states:
        scores = hooks.world.said_by_first(hooks.validate(state.method.soft_prompt()))
        better = _keep_best(scores, state, config)
        event = {"event": "validation", "step": state.step, "epoch": epoch, "best": better, **scores}
        if len(population.states) > 1:
            event["member"] = population.states.index(state)
        hooks.on_event(event)
    log.skip()
    return any(s.stopped for s in states)


def _keep_best(scores: dict[str, float], state: State, config: TrainConfig) -> bool:
    """Keeps the best so far and counts how long ago that was."""
    score = -scores["loss"] if config.select == "loss" else scores[config.select]
    better = score > state.best_score
    if better:
        state.best_score, state.stale = score, 0
        state.best = {name: tensor.detach().clone() for name, tensor in state.method.state_dict().items()}
    else:
        state.stale += 1
    state.stopped = bool(config.patience) and state.stale >= config.patience
    return better


def _due(config: TrainConfig, step: int, since: float, took: float) -> bool:
    """Whether a checkpoint is due ``since`` seconds after the last one, which ``took`` so many."""
    if config.checkpoint_every:
        return step % config.checkpoint_every == 0
    return since >= max(SAVE_SECONDS, SAVE_SHARE * took)


def _on_cpu(population: Population) -> bool:
    return population.states[0].parameters[0].device.type == "cpu"


def _check_finite(state: State, step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise ForewordError(
        f"the loss or its gradient is not finite (loss {loss}, gradient norm {norm}; {state.member})",
        f"step {step}",
        "lower train.lr, set train.clip=1, or model.dtype=float32",
    )
