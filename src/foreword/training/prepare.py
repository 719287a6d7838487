"""From a population to an engine that is known to fit and to compute the same as plain steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from foreword.backbone.choose import Layout
from foreword.backbone.layers import compiled_layers, decoder_layers, recomputed_layers
from foreword.backbone.load import Backbone
from foreword.backbone.memory import MB, Peak, free_memory
from foreword.config import TrainConfig
from foreword.data.encode import common_opening
from foreword.errors import ForewordError
from foreword.records import Segment
from foreword.training.engine import Eager, Engine, EngineName, accumulate, choose_engine, pass_losses, token_budget
from foreword.training.gradcheck import check_gradient
from foreword.training.passes import Reader
from foreword.training.state import Population, State, start
from foreword.training.static import Static

SHARE = 0.8
"""Of the free memory; the rest is for what is not measured here (scoring, graphs' own pools)."""
AHEAD = 64
"""Steps among which the largest is looked for."""
TRIALS = 3
"""Steps an engine has to prove itself on: a real one, a captured one, a replayed one."""
TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
"""Largest relative difference of a loss from plain steps; low precisions differ by themselves."""
LOW_PRECISION = 0.1
Leads = Sequence[tuple[int, int, float]]


@dataclass(frozen=True)
class Prepared:
    """An engine with its training rows; ``notes`` say what was chosen and why."""

    engine: Engine
    segments: list[Segment]
    name: EngineName
    notes: list[str]


@contextmanager
def prepared(
    backbone: Backbone, rows: Sequence[Segment], population: Population, config: TrainConfig, layout: Layout,
    leads: Leads = (),
) -> Iterator[Prepared]:  # fmt: skip
    """The engine for a population, inside a ``with`` block that undoes what it did to the layers.

    Args:
        backbone: the model.
        rows: training rows with whole contexts, virtual ids included.
        population: fresh or restored.
        config: the optimisation.
        layout: how rows share a pass.
        leads: targets inside the soft prompt itself, as ``Reader`` takes them.

    Raises:
        ForewordError: an engine was asked for by name and does not work here.
    """
    if backbone.offloaded:
        what = "part of the backbone lies outside the cards' memory, where no gradient passes"
        fix = "model.quantize=nf4, more model.max_memory, or torchrun with train.parallel=fsdp=N"
        raise ForewordError(what, "key model.device_map", fix)
    opening = common_opening([s.context for s in rows])
    segments = [replace(s, context=s.context[len(opening) :]) for s in rows]
    prompt = population.states[0].method.soft_prompt()
    budget = token_budget(config, backbone.device)
    cached = prompt.tokens - prompt.virtual_ids
    reader = Reader(
        opening, backbone.vocab_size, prompt.virtual_ids, config.batch_size, budget, layout, cached, tuple(leads)
    )
    notes: list[str] = []
    if not population.training:  # a finished run, resumed
        yield Prepared(Eager(backbone, reader, config), segments, "eager", notes)
        return
    with ExitStack() as stack:
        if backbone.device.type == "cuda":
            stack.enter_context(torch.cuda.device(backbone.device))  # for streams and graphs
        if config.recompute:
            layers = stack.enter_context(recomputed_layers(backbone.model))
            notes.append(f"activations of {layers} layers are recomputed")
        if backbone.quantised:
            notes.append(_gradient_checked(backbone, segments, population, config, reader))
        if len(population.states) > 1:
            reader, note = _fitting(backbone, segments, population, config, reader)
            notes.append(note)
        name = _name(backbone, segments, population, config, reader)
        if name == "compile":
            stack.enter_context(compiled_layers(backbone.model))
        problem = "" if name == "eager" else _trial(name, backbone, segments, population, config, reader)
        if problem and config.engine != "auto":
            raise ForewordError(f"the engine does not work here: {problem}", f"train.engine={name}", "use eager")
        notes.append(f"engine eager: {name} failed: {problem}" if problem else f"engine {name}")
        name = "eager" if problem else name
        yield Prepared(_make(name, backbone, reader, config), segments, name, notes)


def _gradient_checked(
    backbone: Backbone, segments: Sequence[Segment], population: Population, config: TrainConfig, reader: Reader
) -> str:
    """Holds the gradient through rounded weights against the loss itself, on the first batch of the first member.

    Raises:
        ForewordError: it is wrong, as those of some quantisations are.
    """
    first = population.training[:1]
    batch = [segments[i] for i in population.batch(first[0], population.step)]
    part = reader.read([batch[: config.batch_size]])[0]
    (state,) = _copies(first, population, config, backbone)
    generator = torch.Generator().manual_seed(0)
    error = check_gradient(
        lambda: pass_losses(backbone, [state], part, config).sum(), state.parameters, backbone.name, generator
    )
    return f"quantised backbone: its gradient agrees with the loss within {error:.1%} on the first batch"


def _make(name: EngineName, backbone: Backbone, reader: Reader, config: TrainConfig) -> Engine:
    if name == "eager":
        return Eager(backbone, reader, config)
    return Static(backbone, reader, config, captured=backbone.device.type == "cuda")


def _name(
    backbone: Backbone, segments: Sequence[Segment], population: Population, config: TrainConfig, reader: Reader
) -> EngineName:
    """The engine's name, from what is still to do."""
    states, plan = population.training, population.plan
    mean = sum(s.tokens for s in segments) / len(segments)
    lead = len(reader.opening)
    tokens = round(len(states) * (lead + mean * min(plan.step_rows, plan.rows)))
    layers = len(decoder_layers(backbone.model)) or 1
    steps = plan.steps - population.step
    if reader.leads or any(s.soft for s in segments):
        return _only_eager(config, "soft and weighted targets have no static shapes")
    if backbone.world.several:
        return _only_eager(config, "several processes share steps of their own shapes")
    name = choose_engine(config.engine, backbone.device, steps, tokens, layers, backbone.parameters)
    if name == "compile" and (config.recompute or reader.cached):
        # torch does not compile what it recomputes, and makes a graph of every layer whose cache is made anew.
        return "graph" if backbone.device.type == "cuda" else "eager"
    return name


def _only_eager(config: TrainConfig, why: str) -> EngineName:
    if config.engine not in ("auto", "eager"):
        raise ForewordError(why, f"train.engine={config.engine}", "train.engine=eager")
    return "eager"


def _fitting(
    backbone: Backbone, segments: Sequence[Segment], population: Population, config: TrainConfig, reader: Reader
) -> tuple[Reader, str]:
    """A budget of tokens that fits the free memory, measured on one member's longest rows."""
    longest = sorted(segments, key=lambda s: -s.tokens)[: config.batch_size]
    part = reader.read([longest])[0]
    state = _copies(population.states[:1], population, config, backbone)[0]
    peak = Peak(backbone.device)
    accumulate(backbone, [state], part, config)
    tokens, size, free = part.row.ids.numel(), peak.size, free_memory(backbone.device)
    if size is None:
        return reader, f"population of {len(population.states)}; memory cannot be measured here"
    fits = backbone.world.least(max(int(SHARE * free / max(size, 1) * tokens), tokens))
    reader = replace(reader, budget=min(reader.budget, fits)) if fits < reader.budget else reader
    at_once = max(1, min(len(population.states), reader.budget // tokens))
    passes = -(-len(population.states) // at_once)
    why = "as many as fit into memory" if reader.budget == fits else "the token budget"
    return reader, (
        f"population of {len(population.states)} soft prompts, {at_once} in a pass"
        + (f" ({passes} passes a step; {why})" if passes > 1 else "")
        + f": about {at_once * size / MB:.0f} MB at the peak of {free / MB:.0f} MB free"
    )


def _trial(
    name: EngineName, backbone: Backbone, segments: Sequence[Segment], population: Population,
    config: TrainConfig, reader: Reader,
) -> str:  # fmt: skip
    """Runs a few steps on copies of the members, by the engine and plainly; returns what is wrong, or nothing."""
    states, plan = population.training, population.plan
    ahead = range(population.step, min(population.step + AHEAD, plan.steps))
    steps = [[[segments[i] for i in population.batch(s, t)] for s in states] for t in ahead]
    batches = max(steps, key=lambda step: sum(s.tokens for batch in step for s in batch))  # what could fail first
    losses = []
    try:
        for engine in (_make("eager", backbone, reader, config), _make(name, backbone, reader, config)):
            engine.load(_copies(states, population, config, backbone), [batches] * TRIALS)
            losses.append(torch.stack([engine.step().loss for _ in range(TRIALS)]).cpu())
    except (RuntimeError, torch.OutOfMemoryError, NotImplementedError) as e:
        return (str(e).strip().splitlines() or [type(e).__name__])[0][:120]
    finally:
        gc.collect()  # the trial's graphs and their memory, before others are captured
        if backbone.device.type == "cuda":
            torch.cuda.empty_cache()
    expected, found = losses
    allowed = TOLERANCE.get(backbone.dtype, LOW_PRECISION)
    worst = float(((found - expected).abs() / expected.abs().clamp(min=0.1)).max())
    return "" if worst <= allowed else f"its losses differ from plain steps by {worst:.1%}"


def _copies(states: Sequence[State], population: Population, config: TrainConfig, backbone: Backbone) -> list[State]:
    """Fresh members that start from where these stand."""
    return start(
        [s.method for s in states], [s.member for s in states], config, population.plan, backbone.device
    ).states
