"""What all contenders start from, and Foreword as one of them.

The only file of the suite that reaches into Foreword's internals: when they move, it alone changes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from foreword.backbone.choose import Choice, choose_layout
from foreword.backbone.load import Backbone, load_backbone
from foreword.config import DataConfig, Member, ModelConfig, PromptConfig, TrainConfig
from foreword.data.encode import common_opening
from foreword.evaluation.scoring import classify
from foreword.jobs.data import read_splits
from foreword.jobs.prepare import first_method, make_encoder
from foreword.jobs.training import validator
from foreword.prompts.methods.base import Start
from foreword.prompts.methods.prompt_tuning import PromptTuning
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Segment
from foreword.training.engine import Eager, token_budget
from foreword.training.loop import Hooks, train
from foreword.training.passes import Reader
from foreword.training.prepare import Prepared, prepared
from foreword.training.state import Plan, make_plan, start

SEED = 0
LR = 0.03
Batch = Sequence[Example]
LabelIds = Sequence[tuple[int, ...]]
"""Token ids of each class's label words, end token included."""


@dataclass(frozen=True)
class Setting:
    """One size of soft prompt over one data set: what every contender is made from."""

    backbone: Backbone
    examples: tuple[Example, ...]
    label_ids: tuple[tuple[int, ...], ...]
    """Empty for free text."""
    rows: torch.Tensor
    """First rows of the soft prompt ``[P, H]``, the same for all contenders."""
    epochs: int
    """Passes over the examples that the schedules of the learning rate are laid out for."""

    @property
    def model(self) -> Any:
        """The loaded backbone that contenders share."""
        return self.backbone.model

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights."""
        return self.backbone.dtype

    @property
    def opening(self) -> tuple[int, ...]:
        """Tokens that all contexts begin with, behind the virtual ones."""
        return common_opening([e.context for e in self.examples])

    @property
    def virtual(self) -> range:
        """Ids of the virtual tokens."""
        first = self.backbone.vocab_size
        return range(first, first + len(self.rows))

    def placed(self, example: Example) -> tuple[int, ...]:
        """The example's context with the virtual tokens in front."""
        return (*self.virtual, *example.context)

    @property
    def segments(self) -> list[Segment]:
        """The training rows as Foreword reads them."""
        return [Segment(self.placed(e), (e.target,)) for e in self.examples]

    @property
    def method(self) -> PromptTuning:
        """Prompt tuning from the first rows."""
        return PromptTuning(Start(self.rows), PromptConfig(), torch.Generator())

    @property
    def steps(self) -> int:
        """Optimiser steps of all epochs."""
        return make_plan(len(self.examples), TrainConfig(epochs=self.epochs)).steps


def load(model: str, device: str, dtype: str) -> Backbone:
    """The backbone by the name that ``foreword train --model`` takes."""
    return load_backbone(ModelConfig(model, device=device, dtype=dtype))


def prepare(backbone: Backbone, data: str, text: str, label: str, virtual_tokens: int, epochs: int) -> Setting:
    """Reads and encodes the rows of ``data`` with the guide's template."""
    splits = read_splits(DataConfig(path=data, template=template(text), label=label))
    encoder = make_encoder(splits.task, backbone, virtual_tokens, kind="prefix")  # contexts without virtual ids
    config = PromptConfig(virtual_tokens=virtual_tokens)
    rows = first_method(config, splits.task, encoder, backbone, Member("text", SEED, LR), None)().detach()
    return Setting(backbone, tuple(encoder.examples(splits.train)), tuple(encoder.label_ids), rows, epochs)


def template(text: str) -> str:
    """The guide's context around the column ``text``."""
    return f"Tweet text : {{{text}}} Label :"


class Foreword:
    """Foreword's own training step and scoring, in the layout it chooses for the backbone."""

    name = "foreword"

    def __init__(self, setting: Setting) -> None:
        self.setting, self.backbone = setting, setting.backbone
        self.opening, self.dtype = (*setting.virtual, *setting.opening), setting.dtype
        self.virtual_tokens = len(setting.rows)
        self.config = TrainConfig(epochs=setting.epochs)
        self.layout = layout_of(setting, self.backbone)
        member = Member("text", SEED, LR)
        self.states = start([setting.method], [member], self.config, plan(setting, self.config), setting.device).states
        budget = token_budget(self.config, setting.device)
        base, batch = self.backbone.vocab_size, self.config.batch_size
        reader = Reader(self.opening, base, self.virtual_tokens, batch, budget, self.layout.train)
        self.engine = Eager(self.backbone, reader, self.config)

    def step(self, batch: Batch) -> float:
        """Loss of one optimiser step."""
        segments = [Segment(self.setting.placed(e)[len(self.opening) :], (e.target,)) for e in batch]
        self.engine.load(self.states, [[segments]])
        return float(self.engine.step().loss)

    def score(self, batches: Sequence[Batch], label_ids: LabelIds) -> list[int]:
        """The likeliest class of every row, all rows in one call."""
        contexts = [self.setting.placed(e) for batch in batches for e in batch]
        prompt = self.states[0].method.soft_prompt()
        probabilities = classify(self.backbone, prompt, contexts, label_ids, self.layout.score)
        return [int(c) for c in probabilities.argmax(1)]


class Members:
    """Foreword's own engines: a population trained in one pass, on a copy of the backbone.

    A copy, because some engines change the layers, and contenders take turns.

    Args:
        setting: what all contenders start from.
        config: the optimisation, with the engine's name.
        count: soft prompts in the population.
        stack: what ends the engine.
        own: copy the backbone; not where its memory would count.

    Raises:
        ForewordError: the engine does not work here.
    """

    def __init__(self, setting: Setting, config: TrainConfig, count: int, stack: ExitStack, own: bool = True) -> None:
        backbone = own_copy(setting.backbone) if own else setting.backbone
        self.plan = plan(setting, config)
        members = [Member("text", SEED + k, LR) for k in range(count)]
        self.population = start([setting.method] * count, members, config, self.plan, setting.device)
        self.layout = layout_of(setting, backbone).train
        began = time.perf_counter()
        self.ready: Prepared = stack.enter_context(
            prepared(backbone, setting.segments, self.population, config, self.layout)
        )
        self.prepare_s = time.perf_counter() - began

    @property
    def engine(self) -> str:
        """The engine in use."""
        return self.ready.name

    def run(self, steps: Sequence[int]) -> list[float]:
        """These steps of the plan, their rows laid out first; returns the last losses ``[K]``."""
        segments, states = self.ready.segments, self.population.states
        batches = [[[segments[i] for i in self.plan.batch(s.member.seed, t)] for s in states] for t in steps]
        self.ready.engine.load(states, batches)
        figures = [self.ready.engine.step() for _ in steps]
        losses: list[float] = figures[-1].loss.tolist()
        return losses


def own_copy(backbone: Backbone) -> Backbone:
    """A backbone of the same weights that may be changed."""
    return replace(backbone, model=copy.deepcopy(backbone.model))


def plan(setting: Setting, config: TrainConfig) -> Plan:
    """Which rows each step reads."""
    return make_plan(len(setting.examples), config)


def layout_of(setting: Setting, backbone: Backbone) -> Choice:
    """The layout Foreword chooses for these rows."""
    sample = [Segment(setting.placed(e), setting.label_ids or (e.target,)) for e in setting.examples]
    return choose_layout(backbone, SoftPrompt(setting.rows.to(setting.device)), sample)


def whole_job(setting: Setting, held_out: Sequence[Example], config: TrainConfig) -> dict[str, Any]:
    """A training as ``foreword train`` runs it, scoring ``held_out`` after every epoch.

    Choosing the layout and preparing the engine are part of it; loading the model and writing files are not.

    Returns:
        ``engine``, and the seconds of its steps alone (``step_s``, all of them together).
    """
    backbone = setting.backbone
    layout = layout_of(setting, backbone)
    member = Member("text", SEED, LR)
    population = start([setting.method], [member], config, plan(setting, config), setting.device)
    held_out = [replace(e, context=setting.placed(e)) for e in held_out]
    hooks = Hooks(validate=validator(backbone, held_out, setting.label_ids, layout))
    with prepared(backbone, setting.segments, population, config, layout.train) as ready:
        train(ready.engine, ready.segments, population, config, hooks)
    return {"engine": ready.name, "step_s": population.seconds}
