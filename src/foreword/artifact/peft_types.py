"""PEFT's six soft-prompt types: the tensors each stores, its configuration, and what a model reads of it.

Observed on peft 0.21.2. A seventh name, ``FOREWORD_PLACED``, is ours: PEFT has no field for where the
virtual tokens stand and drops keys that it does not know with a mere warning, so a prompt that stands
elsewhere would load there and answer wrongly. A type that PEFT does not know it refuses with an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foreword.backbone.kv import Geometry
from foreword.config import PromptConfig
from foreword.errors import ForewordError
from foreword.prompts.methods.prefix_tuning import HIDDEN as PROJECTION_HIDDEN
from foreword.prompts.soft import Kind, SoftPrompt

PEFT_VERSION = "0.21.2"
"""Version of the format written; tests hold it against the installed PEFT."""
PLACED = "FOREWORD_PLACED"
TENSOR = "prompt_embeddings"
TASK_COLS = "prefix_task_cols"
TASK_ROWS = "prefix_task_rows"

Tensors = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What the keys of one type are made from."""

    prompt: PromptConfig
    tensors: Tensors
    base: str
    token_dim: int
    init_text: str | None
    token_ids: Sequence[int]
    token_types: Sequence[int]


def _text_keys(facts: Facts) -> dict[str, Any]:
    """PEFT knows no more of an initialiser than its text; ``base`` is where the tokenizer of it lies."""
    return {
        "prompt_tuning_init": "TEXT" if facts.init_text else "RANDOM",
        "prompt_tuning_init_text": facts.init_text,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": facts.base if facts.init_text else None,
    }


def _encoder_keys(facts: Facts) -> dict[str, Any]:
    return {
        "encoder_dropout": 0.0,
        "encoder_hidden_size": facts.prompt.encoder_size or facts.token_dim,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": facts.prompt.encoder.upper(),
    }


def _prefix_keys(facts: Facts) -> dict[str, Any]:
    default = PROJECTION_HIDDEN if facts.prompt.projection else facts.token_dim  # PEFT's, which nothing then reads
    return {
        "encoder_hidden_size": facts.prompt.encoder_size or default,
        "init_weights": None,
        "prefix_projection": facts.prompt.projection,
    }


def _multitask_keys(facts: Facts) -> dict[str, Any]:
    tasks, _, ranks = facts.tensors[TASK_COLS].shape
    return _text_keys(facts) | {
        "num_ranks": ranks,
        "num_tasks": tasks,
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
    }


def _cpt_keys(facts: Facts) -> dict[str, Any]:
    return {
        "cpt_mask": [1] * len(facts.token_ids),
        "cpt_token_ids": list(facts.token_ids),
        "cpt_tokens_type_mask": list(facts.token_types),
        "opt_loss_decay_factor": facts.prompt.loss_decay,
        "opt_projection_epsilon": facts.prompt.epsilon,
        "opt_projection_format_epsilon": facts.prompt.format_epsilon,
        "opt_weighted_loss_type": "decay",
        "tokenizer_name_or_path": facts.base,
    }


def _cartridge_keys(facts: Facts) -> dict[str, Any]:
    return {"num_frozen_tokens": facts.prompt.frozen_tokens}


def _stored(tensors: Tensors, task: int) -> torch.Tensor:
    """Values ``[P, W]`` as they lie in the file."""
    return tensors[TENSOR].float()


def _of_task(tensors: Tensors, task: int) -> torch.Tensor:
    """Shared rows ``[P, H]`` times the task's low-rank matrix (arXiv 2303.02861): ``[P, H]``."""
    cols, rows = (tensors[name][task : task + 1].float() for name in (TASK_COLS, TASK_ROWS))
    return tensors[TENSOR].float() * (cols @ rows)[0]  # a batch of one, as in PEFT: equal to the last bit


Shapes = Mapping[str, tuple[str, ...]]
_ROWS: Shapes = {TENSOR: ("num_virtual_tokens", "token_dim")}
_PREFIX: Shapes = {TENSOR: ("num_virtual_tokens", "num_layers * 2 * token_dim")}
_FACTORED: Shapes = {
    **_ROWS,
    TASK_COLS: ("num_tasks", "num_virtual_tokens", "num_ranks"),
    TASK_ROWS: ("num_tasks", "num_ranks", "token_dim"),
}


@dataclass(frozen=True)
class SoftPromptType:
    """One type of PEFT's."""

    own_keys: Callable[[Facts], dict[str, Any]]
    """Configuration keys beside those that all types have."""
    shapes: Shapes
    """The tensors, each size named by the configuration key (or product of keys) that states it."""
    kind: Kind = "rows"
    per_token: tuple[str, ...] = ()
    """Configuration keys with a list of one entry a virtual token."""
    values: Callable[[Tensors, int], torch.Tensor] = _stored
    """What a model reads, of a task: ``[P, W]``."""
    placed_by: str = ""
    """The key by which its configuration is known under the name ``FOREWORD_PLACED``."""


TYPES: Mapping[str, SoftPromptType] = {
    "PROMPT_TUNING": SoftPromptType(_text_keys, _ROWS),
    "P_TUNING": SoftPromptType(_encoder_keys, _ROWS),
    "PREFIX_TUNING": SoftPromptType(_prefix_keys, _PREFIX, "prefix"),
    "MULTITASK_PROMPT_TUNING": SoftPromptType(_multitask_keys, _FACTORED, values=_of_task, placed_by="num_tasks"),
    "CPT": SoftPromptType(
        _cpt_keys, _ROWS, per_token=("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"), placed_by="cpt_token_ids"
    ),
    "CARTRIDGE": SoftPromptType(_cartridge_keys, _PREFIX, "prefix"),
}


def peft_config(
    peft_type: str,
    tensors: Tensors,
    *,
    model_config: Any,
    base: str,
    revision: str | None,
    prompt: PromptConfig,
    geometry: Geometry | None = None,
    init_text: str | None = None,
    token_ids: Sequence[int] = (),
    token_types: Sequence[int] = (),
) -> dict[str, Any]:
    """The configuration PEFT writes beside these tensors.

    Args:
        peft_type: a name of ``TYPES``.
        tensors: as stored, by PEFT's names.
        model_config: configuration of the text model.
        base: hub id or folder of the base model.
        revision: of the base model.
        prompt: settings of the soft prompt.
        geometry: of the model's keys and values, for the types that are a prefix.
        init_text: text that the rows started from.
        token_ids: tokens that the rows started from, one a virtual token (CPT).
        token_types: their types in PEFT's numbering (CPT).
    """
    described = TYPES[peft_type]
    layers, heads = int(model_config.num_hidden_layers), getattr(model_config, "num_attention_heads", None)
    tokens, width = tensors[TENSOR].shape
    if described.kind == "prefix":
        assert geometry is not None, "a prefix has the geometry of its model's cache"
        layers, heads, width = geometry.layers, geometry.heads, geometry.heads * geometry.head_dim
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": peft_type,
        "peft_version": PEFT_VERSION,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "token_dim": width,
    }
    return common | described.own_keys(Facts(prompt, tensors, base, width, init_text, token_ids, token_types))


def placed_config(config: Config) -> dict[str, Any]:
    """The configuration of rows that do not stand at the front, which PEFT must not load as if they did."""
    if TYPES[config["peft_type"]].kind == "prefix":
        raise ForewordError(
            "keys and values stand before all text and have no other place",
            "key prompt.placement",
            "use prompt.placement=front, or a method that trains rows",
        )
    return {**config, "peft_type": PLACED}


def type_of(config: Config, place: str) -> SoftPromptType:
    """The description of a configuration's type.

    Raises:
        ForewordError: a type that is no soft prompt, or modules of the model trained along with it.
    """
    name = config.get("peft_type")
    if name == PLACED:
        marked = (t for t in TYPES.values() if t.placed_by and t.placed_by in config)
        return next(marked, TYPES["PROMPT_TUNING"])
    if not isinstance(name, str) or name not in TYPES:
        raise ForewordError(
            f"the adapter's type is {name}; read are {', '.join(TYPES)}", place, "load it with the tool that made it"
        )
    if config.get("modules_to_save"):
        raise ForewordError(
            f"it holds trained modules of the model beside the soft prompt: {config['modules_to_save']}",
            place,
            "load it with PEFT, or train a soft prompt alone",
        )
    return TYPES[name]


def soft_prompt(config: Config, tensors: Tensors, task: int, place: str) -> SoftPrompt:
    """What a model reads of the type's tensors, values ``[P, W]`` in float32.

    Raises:
        ForewordError: shapes or lists that disagree with the configuration, no such task, values not finite.
    """
    described = type_of(config, place)
    sizes = _checked_sizes(described, config, tensors, place)
    for key in described.per_token:
        entries = config.get(key)
        if entries is not None and (not isinstance(entries, list) or len(entries) != sizes["num_virtual_tokens"]):
            raise ForewordError(
                f"'{key}' does not have one entry for each of the {sizes['num_virtual_tokens']} virtual tokens",
                place,
                "train or download it again",
            )
    tasks = sizes.get("num_tasks", 1)
    if not 0 <= task < tasks:
        there = f"it has {tasks}, numbered from 0" if tasks > 1 else "it has task 0 alone"
        raise ForewordError(f"there is no task {task} in this adapter: {there}", place, "give the number of a task")
    for name in described.shapes:
        finite(tensors[name], place)
    return SoftPrompt(finite(described.values(tensors, task), place), described.kind)


def finite(values: torch.Tensor, place: str) -> torch.Tensor:
    """The values in float32, apart from any graph, if they are floats and finite."""
    plain = values.is_floating_point() and values.layout == torch.strided
    found = values.detach().float() if plain else values  # cast first: float64 may overflow float32
    if not plain or not torch.isfinite(found).all():
        raise ForewordError("the soft prompt holds NaN, infinite or non-float values", place, "train it again")
    return found


def _checked_sizes(described: SoftPromptType, config: Config, tensors: Tensors, place: str) -> dict[str, int]:
    """Sizes by their names; what the configuration leaves open is settled by the first tensor that has it."""
    settled: dict[str, int] = {}
    for name, dimensions in described.shapes.items():
        shape = list(tensors[name].shape)
        expected = [_size(dimension, {**config, **settled}) for dimension in dimensions]
        agrees = len(shape) == len(expected) and all(e in (None, n) for e, n in zip(expected, shape, strict=True))
        if not agrees or 0 in shape:
            what = "the soft prompt" if name == TENSOR else f"'{name}'"
            raise ForewordError(
                f"{what} has shape {shape}, its configuration says {expected}", place, "train or download it again"
            )
        settled |= dict(zip(dimensions, shape, strict=True))
    return settled


def _size(dimension: str, known: Config) -> Any:
    """A number; where the configuration has none, what stands there instead (None: open)."""
    factors = [int(key) if key.isdigit() else known.get(key) for key in dimension.split(" * ")]
    odd = [f for f in factors if not isinstance(f, int)]
    return odd[0] if odd else math.prod(f for f in factors if isinstance(f, int))
