"""Recipes: YAML and key=value in, frozen dataclasses out; strict about keys and types."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from foreword.config import SECTIONS, Recipe, field_docs, keys
from foreword.errors import ForewordError, closest

RECIPE = "recipe.yaml"
"""A run folder's own recipe."""
BREAKS = frozenset("\n\r\x85\u2028\u2029")
"""What YAML takes for a line break; in plain text and single quotes some would be read as spaces."""


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
        literal = _is_text(hint) and not (_is_list(hint) and text.startswith("["))
        nested.setdefault(section, {})[name] = text if literal else _yaml_value(text, key)
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


def _unknown(key: str, known: list[str], where: str) -> ForewordError:
    by_end = {k.split(".")[-1]: k for k in reversed(known)}  # "lr" -> "train.lr"; the first of several
    found = closest(key, known) or by_end.get(closest(key, by_end), "")
    hint = f"did you mean '{found}'?" if found else "all keys: foreword train --help-keys"
    return ForewordError(f"unknown key '{key}'", where, hint)


def _is_text(hint: Any) -> bool:
    return hint is str or (str in typing.get_args(hint) and typing.get_origin(hint) is types.UnionType)


def _is_list(hint: Any) -> bool:
    """Whether a field takes one value or a list of them."""
    return any(typing.get_origin(a) is tuple for a in typing.get_args(hint))


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
        one = next(a for a in typing.get_args(hint) if a is not type(None))
        if _is_list(hint):
            return _one_or_several(value, one, key, where)
        if value is None or value == "":
            return None
        hint = one
    of = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else str
    if of is not str:
        several = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(v, of, key, where) for v in several)
    convert, name = KINDS[typing.get_origin(hint) or hint]
    try:
        return convert(value)
    except (ValueError, OverflowError):
        raise ForewordError(f"{key} is {value!r}, not {name}", where, f"give {key} {name}") from None


def _one_or_several(value: Any, one: Any, key: str, where: str) -> Any:
    """A single value, or a list of at least one, without repetitions; a list of one is the value."""
    if not isinstance(value, (list, tuple)):
        return _coerce(value, one, key, where)
    typed = tuple(_coerce(v, one, key, where) for v in value)
    if not typed or len(set(typed)) < len(typed):
        raise ForewordError(f"{key} is {value!r}", where, "list one or more different values")
    return typed if len(typed) > 1 else typed[0]


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
