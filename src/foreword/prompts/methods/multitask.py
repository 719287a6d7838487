"""Multitask prompt tuning: one shared prompt, thin factors for each task (Wang et al. 2023, arXiv 2303.02861)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from foreword.config import PromptConfig
from foreword.prompts.methods.base import Method, Start

NOISE = 0.02
"""Standard deviation of what tells the tasks apart at the start; PEFT draws all of its factors with it."""


class Multitask(Method):
    """Task ``t`` reads ``shared [P, H] * (columns[t] [P, r] @ rows[t] [r, H])``, an elementwise product.

    The factors come from a trained source, or start with products of ones plus small noise, so that every task
    starts near the rows it is given. (PEFT's N(0, 0.02) factors have products of almost 0: all tasks start at
    a prompt of zeros, whatever the initialiser.)
    """

    peft_type = "MULTITASK_PROMPT_TUNING"

    def __init__(self, start: Start, config: PromptConfig, generator: torch.Generator) -> None:
        super().__init__()
        if start.factors is None:
            columns, rows = _near_ones(start, config.rank, generator)
        else:
            columns, rows = (_for_tasks(factor, start.tasks) for factor in start.factors)
        self.shared = nn.Parameter(start.values.clone())
        self.columns, self.rows = nn.Parameter(columns), nn.Parameter(rows)

    def forward(self) -> torch.Tensor:
        """All tasks' prompts ``[T * P, H]``: task ``t`` has the ``P`` rows from ``t * P`` on."""
        return (self.shared * (self.columns @ self.rows)).flatten(0, 1)

    def stored(self) -> dict[str, torch.Tensor]:
        """See ``Method``: shared prompt and factors apart, as PEFT keeps them."""
        return {
            "prompt_embeddings": self.shared.detach(),
            "prefix_task_cols": self.columns.detach(),
            "prefix_task_rows": self.rows.detach(),
        }


def task_prompt(tensors: Mapping[str, torch.Tensor], task: int) -> torch.Tensor:
    """One task's prompt ``[P, H]`` from the stored tensors."""
    return tensors["prompt_embeddings"] * (tensors["prefix_task_cols"][task] @ tensors["prefix_task_rows"][task])


def _near_ones(start: Start, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, width = start.values.shape
    columns = torch.randn(start.tasks, tokens, rank, generator=generator) * NOISE
    rows = torch.randn(start.tasks, rank, width, generator=generator) * NOISE
    columns[:, :, 0], rows[:, 0, :] = 1, 1
    return columns, rows


def _for_tasks(factor: torch.Tensor, tasks: int) -> torch.Tensor:
    """The source's factors, task by task; where the number of tasks differs, their mean for each."""
    if len(factor) == tasks:
        return factor.clone()
    return factor.mean(0, keepdim=True).repeat(tasks, 1, 1)
