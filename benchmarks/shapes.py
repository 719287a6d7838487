"""Backbones of known shapes with random weights, and rows of realistic lengths: a benchmark without a hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from ours import SEED, Setting

from foreword.backbone.load import Backbone, freeze
from foreword.records import Example

END = 0
"""Id of the end token, which closes every target."""
OPENING, CLOSING, YES, NO = 3, 3, (7,), (8, 9)
"""Tokens of the template before and after the text, and the words of the two classes."""
FIRST_ID = 16
"""Ids of random text begin here, above those of template and classes."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a whole row, context and target: a clipped normal distribution with one row of the longest."""

    mean: int
    spread: int
    shortest: int
    longest: int

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """As many lengths."""
        found = (self.mean + self.spread * torch.randn(count, generator=generator)).round().int()
        found[count // 2] = self.longest
        return [int(n) for n in found.clamp(self.shortest, self.longest)]


TWEETS = Lengths(mean=36, spread=12, shortest=12, longest=61)
REASONING = Lengths(mean=250, spread=110, shortest=60, longest=768)
"""Of MetaMathQA, which PEFT's own benchmark trains on."""
TARGET_SHARE = 0.6
"""Of a row of REASONING: the answer, on whose tokens the loss is."""

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "bloomz-560m": {
        "model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880,
    },
    "Llama-3.2-3B": {
        "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128256,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""What makes a step's time, by the name of a model of this shape."""
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "n_layer": 2, "num_attention_heads": 4, "n_head": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "vocab_size": 320,
}  # fmt: skip


def backbone(name: str, device: torch.device, dtype: torch.dtype, tiny: bool) -> Backbone:
    """A frozen model of a shape, made on the device; ``tiny`` keeps the architecture alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(SHAPES[name])
    if tiny:
        sizes |= {key: TINY[key] for key in sizes.keys() & TINY.keys()}
    config = AutoConfig.for_model(**sizes, bos_token_id=END, eos_token_id=END, pad_token_id=END)
    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Backbone(freeze(model), SimpleNamespace(eos_token_id=END), f"{name} (random)")


def tweets(found: Backbone, count: int, virtual_tokens: int, epochs: int) -> Setting:
    """Rows of two classes in a template, as ``count`` short texts."""
    generator = torch.Generator().manual_seed(SEED)
    label_ids = ((*YES, END), (*NO, END))
    examples = []
    for i, length in enumerate(TWEETS.draw(count, generator)):
        label = i % 2
        text = _text(found, length - OPENING - CLOSING - len(label_ids[label]), generator)
        context = (*range(1, 1 + OPENING), *text, *range(1 + OPENING, 1 + OPENING + CLOSING))
        examples.append(Example(i, context, label_ids[label], label))
    return Setting(found, tuple(examples), label_ids, _rows(found, virtual_tokens, generator), epochs)


def reasoning(found: Backbone, count: int, virtual_tokens: int, epochs: int, shrink: int = 1) -> Setting:
    """Rows of free text, most of which is target; ``shrink`` divides their lengths."""
    generator = torch.Generator().manual_seed(SEED)
    examples = []
    for i, length in enumerate(REASONING.draw(count, generator)):
        total = length // shrink
        target = round(TARGET_SHARE * total)
        context = (*range(1, 1 + OPENING), *_text(found, total - target - OPENING, generator))
        examples.append(Example(i, context, (*_text(found, target - 1, generator), END)))
    return Setting(found, tuple(examples), (), _rows(found, virtual_tokens, generator), epochs)


def _text(found: Backbone, length: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(FIRST_ID, found.vocab_size, (length,), generator=generator).tolist())


def _rows(found: Backbone, virtual_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """First rows of a soft prompt ``[P, H]``: embeddings of random tokens."""
    ids = torch.tensor(_text(found, virtual_tokens, generator), device=found.device)
    return found.embedding.weight[ids].detach().float().cpu()  # type: ignore[index]
