"""What a recipe may not say: values out of range and keys that contradict each other."""

from __future__ import annotations

import math
from pathlib import Path

from foreword.config import DataConfig, Recipe, members, value_of
from foreword.errors import ForewordError

FILES = (".csv", ".jsonl", ".parquet")
"""Suffixes of data files."""
REQUIRED = {
    "model.id": ("no model given", "add --model ID (or model.id=ID)"),
    "data.path": ("no training data given", "add --data FILE (or data.path=FILE)"),
    "data.label": ("no label column given", "add --label COLUMN"),
}
COUNTS = (
    "prompt.virtual_tokens",
    "prompt.population",
    "train.epochs",
    "train.batch_size",
    "train.accumulate",
    "train.validate_every",
)
NOT_NEGATIVE = (
    "train.warmup_steps",
    "train.clip",
    "train.weight_decay",
    "train.token_budget",
    "train.checkpoint_every",
    "train.patience",
    "data.max_length",
)
FRACTIONS = ("data.eval_fraction", "data.validation_fraction")
CHOICES = {
    "data.task": ("auto", "classify", "generate"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.attention": ("auto", "sdpa", "eager", "flex_attention"),
    "train.select": ("last", "loss", "accuracy", "macro_f1"),
    "train.autocast": ("auto", "on", "off"),
    "train.engine": ("auto", "eager", "graph", "compile"),
}


def check(recipe: Recipe) -> None:
    """Refuses values and combinations that cannot work, by key, before anything is loaded."""
    _check_given(recipe)
    _check_numbers(recipe)
    _check_choices(recipe)
    _check_held_out(recipe.data)
    _check_selection(recipe)


def _check_given(recipe: Recipe) -> None:
    for key, (what, fix) in REQUIRED.items():
        _need(bool(value_of(recipe, key)), key, what, fix)
    data = recipe.data
    _need(bool(data.text or data.template), "data.text", "no input column given", "add --text COLUMN or --template")


def _check_numbers(recipe: Recipe) -> None:
    """Ranges. Written so that NaN, which compares false with everything, is refused too."""
    folds = recipe.data.folds
    for lr in {m.lr for m in members(recipe)}:
        _need(0 < lr < math.inf, "train.lr", f"train.lr must be more than 0, not {lr}", "for example train.lr=0.03")
    for key in COUNTS:
        value = value_of(recipe, key)
        _need(value >= 1, key, f"{key} must be more than 0, not {value}", f"set {key} to 1 or more")
    for key in NOT_NEGATIVE:
        value = value_of(recipe, key)
        _need(0 <= value < math.inf, key, f"{key} must not be negative, not {value}", f"set {key} to 0 or more")
    for key in FRACTIONS:
        value = value_of(recipe, key)
        _need(0 <= value < 1, key, f"{key} must lie in [0, 1), not {value}", f"for example {key}=0.2")
    _need(folds == 0 or folds >= 2, "data.folds", f"data.folds must be 0 or at least 2, not {folds}", "data.folds=5")


def _check_choices(recipe: Recipe) -> None:
    for key, known in CHOICES.items():
        value = value_of(recipe, key)
        _need(value in known, key, f"{key} is '{value}'", f"choose one of {', '.join(known)}")


def _check_held_out(data: DataConfig) -> None:
    """One way to hold rows out, and never the training rows themselves by accident."""
    ways = {
        "data.eval_path / data.eval_split": bool(data.eval_path or data.eval_split),
        "data.eval_fraction": data.eval_fraction > 0,
        "data.folds": data.folds > 0,
    }
    given = [key for key, on in ways.items() if on]
    _need(len(given) < 2, given[0] if given else "", f"{' and '.join(given)} exclude each other", "keep one of them")
    _need(
        not data.eval_split or bool(data.eval_path) or Path(data.path).suffix.lower() not in FILES,
        "data.eval_split",
        f"{data.path} is one file and has no split '{data.eval_split}'",
        "add --eval-data FILE, or data.eval_fraction=0.2",
    )


def _check_selection(recipe: Recipe) -> None:
    data, train = recipe.data, recipe.train
    _need(
        not (train.recompute and train.engine == "compile"),
        "train.recompute",
        "train.recompute and train.engine=compile exclude each other",
        "train.engine=auto",
    )
    _need(
        recipe.prompt.population == 1 or not isinstance(train.seed, tuple),
        "prompt.population",
        "prompt.population and a list in train.seed exclude each other",
        "keep the list, or one seed to count up from",
    )
    _need(
        train.select == "last" or data.validation_fraction > 0,
        "train.select",
        f"train.select={train.select} needs validation rows",
        "add data.validation_fraction=0.2 (the held-out rows are never used to choose)",
    )
    _need(
        train.patience == 0 or train.select != "last",
        "train.patience",
        "train.patience needs a score to watch",
        "add train.select=loss and data.validation_fraction=0.2",
    )


def _need(ok: bool, key: str, what: str, fix: str) -> None:
    if not ok:
        raise ForewordError(what, f"key {key}", fix)
