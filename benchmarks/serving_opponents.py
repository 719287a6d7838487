"""Who else can answer: PEFT, which switches adapters, and plain transformers without a soft prompt.

Both work in process over one loaded backbone, in batches of eight requests in the order they came, padded on the left,
greedily, to the same number of new tokens as everybody. Tokenising and decoding are inside the clock, as they are
behind HTTP.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from serving_load import Answer, Round
from serving_ours import Ask, Setting
from transformers import GenerationConfig, StoppingCriteriaList

from foreword.backbone.layout import left_pad

BATCH = 8
GUIDE_TOKENS = 10
"""New tokens of every row in PEFT's guide, however short its label."""
OK = 200


class Plain:
    """transformers' ``generate`` of the backbone alone: what answers cost without any soft prompt."""

    name = "plain"

    def __init__(self, setting: Setting, tokens: int) -> None:
        self.setting, self.tokens = setting, tokens

    def complete(self, asks: Sequence[Ask]) -> Round:
        """The texts of all requests."""
        zero = time.perf_counter()
        answers: list[Answer] = []
        for batch in batches(asks):
            answers += answered(self.setting, self.setting.backbone.model, batch, self.tokens, zero)
        return Round(time.perf_counter() - zero, answers)


class Peft:
    """PEFT with all adapters loaded: requests are grouped by adapter, and it switches for every group.

    Args:
        setting: what all contenders start from.
        folder: of adapter folders.
        prompts: the adapters to load.
        tokens: new tokens of a completion.
    """

    name = "peft"

    def __init__(self, setting: Setting, folder: Path, prompts: Sequence[str], tokens: int) -> None:
        self.setting, self.tokens = setting, tokens
        first, *others = prompts
        with warnings.catch_warnings():  # transformers', at PEFT's own call
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            self.model: Any = PeftModel.from_pretrained(setting.backbone.model, folder / first, adapter_name=first)
            for name in others:
                self.model.load_adapter(folder / name, adapter_name=name)
        self.model.eval()

    def complete(self, asks: Sequence[Ask]) -> Round:
        """The texts of all requests."""
        return self._grouped(asks, self.tokens, None)

    def classify(self, asks: Sequence[Ask]) -> Round:
        """The label of every request as text: as many tokens as the longest one has, fewer where all have ended."""
        longest = max(map(len, self.setting.encoder(None).label_ids))
        return self._grouped(asks, longest, self.setting.backbone.end_id)

    def classify_as_in_guide(self, asks: Sequence[Ask]) -> Round:
        """The same with the number of tokens that PEFT's guide asks for."""
        return self._grouped(asks, GUIDE_TOKENS, self.setting.backbone.end_id)

    def _grouped(self, asks: Sequence[Ask], tokens: int, end: int | None) -> Round:
        zero = time.perf_counter()
        groups: dict[str, list[int]] = {}
        for i, ask in enumerate(asks):
            assert ask.prompt is not None, "PEFT is asked for soft prompts only"
            groups.setdefault(ask.prompt, []).append(i)
        answers: dict[int, Answer] = {}
        for name, members in groups.items():
            self.model.set_adapter(name, inference_mode=True)
            for batch in batches(members):
                found = answered(self.setting, self.model, [asks[i] for i in batch], tokens, zero, end)
                answers.update(zip(batch, found, strict=True))
        return Round(time.perf_counter() - zero, [answers[i] for i in range(len(asks))])


class Clock:
    """A stopping criterion that notes when each token of a batch was there, and stops nothing."""

    def __init__(self, zero: float) -> None:
        self.zero = zero
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called by transformers after every token."""
        self.times.append(time.perf_counter() - self.zero)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def answered(
    setting: Setting, model: Any, asks: Sequence[Ask], tokens: int, zero: float, end: int | None = None
) -> list[Answer]:
    """One batch; its answers have all ended when its last token has come.

    Args:
        setting: what all contenders start from.
        model: transformers' or PEFT's.
        asks: the batch.
        tokens: most new tokens of each.
        zero: when the round began.
        end: the token that ends an answer; None: nothing does.
    """
    tokenizer = setting.backbone.tokenizer
    ids, mask = left_pad(tokenizer([setting.rendered(ask.text) for ask in asks])["input_ids"])
    clock = Clock(zero)
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=setting.backbone.end_id
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Position ids are not supported")  # PEFT, at its own call
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    new = out[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    ended = time.perf_counter() - zero
    return [Answer(OK, 0.0, ended, clock.times, text, new.shape[1]) for text in texts]


def batches(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Batches of eight; the last one may be smaller."""
    return (items[i : i + BATCH] for i in range(0, len(items), BATCH))


def said_label(classes: Mapping[str, str], text: str) -> str | None:
    """The class whose words an answer is, as the guide compares texts; None: it says something else."""
    return next((name for name, words in classes.items() if words == text.strip()), None)
