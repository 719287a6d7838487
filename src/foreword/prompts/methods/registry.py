"""The methods by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from foreword.config import Member, PromptConfig
from foreword.errors import ForewordError, nearest
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.methods.cartridge import Cartridge
from foreword.prompts.methods.context_tuning import ContextTuning
from foreword.prompts.methods.cpt import ContextAware
from foreword.prompts.methods.low_rank import LowRank
from foreword.prompts.methods.multitask import Multitask
from foreword.prompts.methods.p_tuning import PTuning
from foreword.prompts.methods.prefix_tuning import PrefixTuning
from foreword.prompts.methods.prompt_tuning import PromptTuning
from foreword.prompts.methods.residual import Residual

METHODS: dict[str, type[Method]] = {
    "prompt-tuning": PromptTuning,
    "p-tuning": PTuning,
    "residual": Residual,
    "low-rank": LowRank,
    "prefix-tuning": PrefixTuning,
    "context-tuning": ContextTuning,
    "multitask": Multitask,
    "cpt": ContextAware,
    "cartridge": Cartridge,
}
"""What ``prompt.method`` may say."""
EXAMPLES = "examples"
"""What the initialiser of a method that starts from training rows is called."""


def find(name: str) -> type[Method]:
    """The method of a name.

    Raises:
        ForewordError: there is none.
    """
    if name not in METHODS:
        fix = nearest(name, METHODS) or f"known: {', '.join(METHODS)}"
        raise ForewordError(f"unknown method '{name}'", "key prompt.method", fix)
    return METHODS[name]


def with_rates(members: Sequence[Member], config: PromptConfig) -> tuple[Member, ...]:
    """Members whose learning rate is left open get the method's own; what starts from rows has no other initialiser."""
    method = find(config.method)
    return tuple(
        replace(m, lr=m.lr or method.rate(config), init=EXAMPLES if method.shows_rows else m.init) for m in members
    )


def build(start: Start, config: PromptConfig, generator: torch.Generator) -> Method:
    """The method of a configuration, ready to train; refuses settings it cannot work with."""
    return find(config.method)(start, config, generator)
