"""The opponent: PEFT's prompt-tuning guide as published, over the same rows.

Left padding to a fixed 64 tokens, labels of -100 over the context, AdamW 3e-2 with a linear
schedule; evaluation is the forward pass with its labels, as the guide's loop has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model

from foreword.records import Example

LENGTH = 64


def wrap(model: Any, virtual_tokens: int) -> Any:
    """The guide's PEFT model over an already loaded backbone."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=virtual_tokens)
    return get_peft_model(model, config)


def batch_of(examples: Sequence[Example], pad: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Left-padded tensors ``[B, length]`` of the rows, cut on the left where they are longer."""
    ids, mask, labels = [], [], []
    for e in examples:
        row = [*e.context, *e.target][-length:]
        gap = length - len(row)
        ids.append([pad] * gap + row)
        mask.append([0] * gap + [1] * len(row))
        labels.append([-100] * (length - len(e.target)) + list(e.target))
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


class GuideLoop:
    """One training step at a time, and one evaluation pass."""

    def __init__(self, model: Any, steps: int) -> None:
        from transformers import get_linear_schedule_with_warmup

        self.model = model
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=3e-2)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, steps)

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Loss of one step."""
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[list[int]]:
        """The guide's evaluation: loss and argmax tokens of every batch."""
        found: list[list[int]] = []
        for batch in batches:
            out = self.model(**batch)
            float(out.loss)
            found += torch.argmax(out.logits, -1).tolist()
        return found
