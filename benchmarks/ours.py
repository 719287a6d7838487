"""What all contenders start from, and Foreword as one of them.

The only file of the suite that reaches into Foreword's internals: when they move, it alone changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreword.backbone.choose import choose_layout
from foreword.backbone.load import Backbone, load_backbone
from foreword.config import DataConfig, Member, ModelConfig, PromptConfig, TrainConfig
from foreword.data.encode import common_opening
from foreword.evaluation.scoring import classify
from foreword.jobs.data import read_splits
from foreword.jobs.prepare import initial_rows, make_encoder
from foreword.records import Example, Segment
from foreword.training.engine import Eager, token_budget
from foreword.training.passes import Reader
from foreword.training.state import make_plan, start

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
        """Tokens that all contexts begin with."""
        return common_opening([e.context for e in self.examples])

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
    encoder = make_encoder(splits.task, backbone, virtual_tokens)
    rows = initial_rows(PromptConfig(virtual_tokens), splits.task, encoder, backbone, "text", SEED)
    return Setting(backbone, tuple(encoder.examples(splits.train)), tuple(encoder.label_ids), rows, epochs)


def template(text: str) -> str:
    """The guide's context around the column ``text``."""
    return f"Tweet text : {{{text}}} Label :"


class Foreword:
    """Foreword's own training step and scoring, in the layout it chooses for the backbone."""

    name = "foreword"

    def __init__(self, setting: Setting) -> None:
        self.backbone, self.opening, self.dtype = setting.backbone, setting.opening, setting.dtype
        self.virtual_tokens = len(setting.rows)
        self.config = TrainConfig(epochs=setting.epochs)
        sample = [Segment(e.context, setting.label_ids[:4] or (e.target,)) for e in setting.examples]
        self.layout = choose_layout(self.backbone, setting.rows.to(setting.device), sample)
        plan = make_plan(len(setting.examples), self.config)
        member = Member("text", SEED, LR)
        self.states = start([setting.rows], [member], self.config, plan, setting.device).states
        budget = token_budget(self.config, setting.device)
        base, batch = self.backbone.vocab_size, self.config.batch_size
        reader = Reader(self.opening, base, self.virtual_tokens, batch, budget, self.layout.train)
        self.engine = Eager(self.backbone, reader, self.config)

    def step(self, batch: Batch) -> float:
        """Loss of one optimiser step."""
        segments = [Segment(e.context[len(self.opening) :], (e.target,)) for e in batch]
        self.engine.load(self.states, [[segments]])
        return float(self.engine.step().loss)

    def score(self, batches: Sequence[Batch], label_ids: LabelIds) -> list[int]:
        """The likeliest class of every row, all rows in one call."""
        contexts = [e.context for batch in batches for e in batch]
        rows = self.states[0].rows.detach()
        probabilities = classify(self.backbone, rows, contexts, label_ids, self.layout.score)
        return [int(c) for c in probabilities.argmax(1)]
