"""PEFT, over the same loaded backbone and rows: as its guide has it, at its best, LoRA, and class by class.

All make their tensors inside the timed step, as Foreword does. They stay in eval mode: the guide's
``model.train()`` would switch on the shared backbone's dropout, and costs no time without dropout.
Prompt tuning shares the backbone; LoRA changes modules in place, so it gets a copy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from ours import Batch, LabelIds, Setting
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

GUIDE_LENGTH = 64
"""Tokens every row is padded or cut to in the guide."""
PROMPT_RATE, LORA_RATE = 3e-2, 1e-3
IGNORED = -100
"""The label that transformers' loss leaves out."""


class Opponent:
    """A PEFT model with the guide's loop around it.

    Args:
        name: of the contender.
        model: a PEFT model.
        setting: what all contenders start from.
        rate: first learning rate of AdamW, falling linearly to 0.
        virtual_tokens: P; 0 without a soft prompt.
        dtype: type of the arithmetic; autocast where the weights have another.
        length: tokens of every row; None: as long as the batch's longest.
        options: more arguments of the model's forward.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        setting: Setting,
        rate: float,
        virtual_tokens: int,
        dtype: torch.dtype,
        length: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import get_linear_schedule_with_warmup

        self.name, self.model, self.virtual_tokens, self.dtype = name, model.eval(), virtual_tokens, dtype
        self.length, self.options = length, dict(options or {})
        self.device, self.pad = setting.device, setting.backbone.end_id
        self._autocast = dtype != setting.dtype
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, 0, setting.steps)

    def step(self, batch: Batch) -> float:
        """Loss of one optimiser step."""
        loss = self.forward([(e.context, e.target) for e in batch], labelled=True).loss
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], label_ids: LabelIds) -> list[list[int]]:
        """The guide's evaluation: the loss and the likeliest token at every position of every row."""
        found: list[list[int]] = []
        for batch in batches:
            out = self.forward([(e.context, e.target) for e in batch], labelled=True)
            float(out.loss)
            found += torch.argmax(out.logits, -1).tolist()
        return found

    def forward(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], labelled: bool) -> Any:
        """The model's output on left-padded rows of (context, target), with or without its loss."""
        tensors = padded(pairs, self.pad, self.length)
        if not labelled:
            del tensors["labels"]
        on_device = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self._autocast):
            return self.model(**on_device, **self.options)


class PerClass:
    """Scoring as PEFT users write it: one full padded row for each row and class."""

    name = "per-class"

    def __init__(self, setting: Setting) -> None:
        self.guide = guide(setting)

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], label_ids: LabelIds) -> list[int]:
        """The class whose label words are likeliest, of every row."""
        return [c for batch in batches for c in self._batch(batch, label_ids).argmax(1).tolist()]

    def _batch(self, batch: Batch, label_ids: LabelIds) -> torch.Tensor:
        """Log-likelihoods ``[B, C]``; only the label words' own logits are normalised."""
        columns = []
        for words in label_ids:
            logits = self.guide.forward([(e.context, words) for e in batch], labelled=False).logits
            logprobs = logits[:, -len(words) - 1 : -1].float().log_softmax(-1)
            index = torch.tensor(words, device=logits.device).expand(len(batch), -1)[..., None]
            columns.append(logprobs.gather(-1, index).sum((1, 2)))
        return torch.stack(columns, 1)


def guide(setting: Setting) -> Opponent:
    """PEFT's guide as published: left padding to 64 tokens, AdamW 3e-2, in the type of the weights.

    Longer rows are cut to 64 tokens, as there: it then reads less than the others, in its favour.
    """
    return _prompt_tuning("guide", setting, setting.dtype, GUIDE_LENGTH, {})


def best(setting: Setting) -> Opponent:
    """Prompt tuning with PEFT's own best settings.

    Padding to the batch's longest row, no cache of keys and values in training, and bf16 on
    CUDA. On the CPU it stays in float32, which is the fast type where a processor has no bf16
    units (the measured ceilings in each result show by how much).
    """
    dtype = torch.bfloat16 if setting.device.type == "cuda" else setting.dtype
    return _prompt_tuning("best", setting, dtype, None, {"use_cache": False})


def lora(setting: Setting, rank: int) -> Opponent:
    """LoRA in PEFT's default target modules on a copy of the backbone, otherwise as ``best``."""
    torch.manual_seed(0)
    model = _wrap(copy.deepcopy(setting.model), LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank))
    dtype = torch.bfloat16 if setting.device.type == "cuda" else setting.dtype
    return Opponent(f"lora{rank}", model, setting, LORA_RATE, 0, dtype, None, {"use_cache": False})


TRAINING: dict[str, Callable[[Setting], Opponent]] = {
    "guide": guide,
    "best": best,
    "lora8": lambda setting: lora(setting, 8),
    "lora32": lambda setting: lora(setting, 32),
}
SCORING = ("guide", "best")
"""Those of TRAINING that are timed in the guide's evaluation too."""
NAMES = (*TRAINING, PerClass.name)


def padded(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int, length: int | None
) -> dict[str, torch.Tensor]:
    """Left-padded ids, mask and labels ``[B, length]``; longer rows lose their first tokens."""
    rows = [[*context, *target] for context, target in pairs]
    width = length or max(map(len, rows))
    ids, mask, labels = [], [], []
    for row, (_, target) in zip(rows, pairs, strict=True):
        kept = row[-width:]
        gap = width - len(kept)
        ids.append([pad] * gap + kept)
        mask.append([0] * gap + [1] * len(kept))
        labels.append([IGNORED] * (width - len(target)) + list(target))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def _prompt_tuning(
    name: str, setting: Setting, dtype: torch.dtype, length: int | None, options: Mapping[str, Any]
) -> Opponent:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(setting.rows))
    model = _wrap(setting.model, config)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(setting.rows)
    return Opponent(name, model, setting, PROMPT_RATE, len(setting.rows), dtype, length, options)


def _wrap(model: Any, config: Any) -> Any:
    with warnings.catch_warnings():  # transformers', at PEFT's own call
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)
