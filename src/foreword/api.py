"""The Python interface: ``foreword.train``, ``foreword.tune`` and ``foreword.load``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from foreword.config import Recipe
from foreword.jobs.ensemble import Ensemble, load_any, open_any
from foreword.jobs.load import Foreword, Prediction, open_run
from foreword.jobs.train import run
from foreword.jobs.tune import tune as run_tune
from foreword.recipe import load_recipe, merge
from foreword.records import Row

__all__ = ["Ensemble", "Foreword", "Prediction", "load", "train", "tune"]
IN_MEMORY = "rows in memory"


def train(
    recipe: str | Path | Recipe | None = None,
    *,
    out: str | Path,
    model: str | Mapping[str, Any] | None = None,
    data: str | Sequence[Row] | Mapping[str, Any] | None = None,
    eval_data: str | Sequence[Row] | None = None,
    text: str | None = None,
    label: str | None = None,
    template: str | None = None,
    prompt: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Foreword:
    """Trains a soft prompt, scores it, writes the run folder and returns it loaded.

    Args:
        recipe: a YAML file or a ``Recipe``; the other arguments go over it.
        out: run folder, new or empty (or one to go on with).
        model: backbone by name, or the keys of the ``model`` section.
        data: training rows: a file, hub id, list of dictionaries, or the ``data`` section's keys.
        eval_data: held-out rows to score on: a file, hub id or list of dictionaries.
        text: input column.
        label: label column.
        template: context template.
        prompt: keys of the ``prompt`` section, such as ``{"virtual_tokens": 8}``.
        train: keys of the ``train`` section, such as ``{"epochs": 50}``.
        resume: go on with the run in ``out``.
        quiet: print nothing.
    """
    sections = {"prompt": dict(prompt or {}), "train": dict(train or {})}
    given = _given(recipe, model, data, eval_data, text, label, template, sections)
    backbone = run(given.recipe, Path(out), resume, Console(quiet=quiet), given.rows, given.eval_rows)
    return open_run(Path(out), backbone)


def tune(
    recipe: str | Path | Recipe | None = None,
    *,
    out: str | Path,
    model: str | Mapping[str, Any] | None = None,
    data: str | Sequence[Row] | Mapping[str, Any] | None = None,
    eval_data: str | Sequence[Row] | None = None,
    text: str | None = None,
    label: str | None = None,
    template: str | None = None,
    tune: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    prompt: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Foreword | Ensemble:
    """Searches by cross-validation, trains an ensemble of the winners on all rows and returns it loaded.

    Args:
        tune: keys of the ``tune`` section, such as ``{"minutes": 20, "members": 4}``.
        train: keys of the ``train`` section that all candidates share, such as ``{"epochs": 20}``.
        prompt: keys of the ``prompt`` section that all share, such as ``{"init_text": "..."}``.
        recipe, out, model, data, eval_data, text, label, template, resume, quiet: as in ``train``.
    """
    sections = {"prompt": dict(prompt or {}), "train": dict(train or {}), "tune": dict(tune or {})}
    given = _given(recipe, model, data, eval_data, text, label, template, sections)
    backbone = run_tune(given.recipe, Path(out), resume, Console(quiet=quiet), given.rows, given.eval_rows)
    return open_any(Path(out), backbone)


def load(path_or_id: str | Path, **options: Any) -> Foreword | Ensemble:
    """Loads a run, an adapter folder (ours or PEFT's), an ensemble or a hub adapter, with its backbone.

    Args:
        path_or_id: folder or hub id.
        options: ``model`` (backbone, where the adapter's own name for it does not lead to it), ``device``,
            ``dtype``, ``revision`` (of a hub adapter), ``template``, ``label_words`` and ``separator`` (for adapters
            without a sidecar), ``force`` (another backbone than it was trained for), ``quantize``,
            ``device_map``, ``max_memory``.

    Raises:
        ForewordError: nothing there, something damaged, or a backbone that does not match.
    """
    return load_any(path_or_id, **options)


@dataclass(frozen=True)
class _Given:
    """What a call said: a recipe, and rows in memory."""

    recipe: Recipe
    rows: list[Row] | None
    eval_rows: list[Row] | None


def _given(
    recipe: str | Path | Recipe | None, model: str | Mapping[str, Any] | None,
    data: str | Sequence[Row] | Mapping[str, Any] | None, eval_data: str | Sequence[Row] | None,
    text: str | None, label: str | None, template: str | None, sections: Mapping[str, Mapping[str, Any]],
) -> _Given:  # fmt: skip
    """A call's arguments over its recipe."""
    base = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe)) if recipe else Recipe()
    section: dict[str, Any] = dict(data) if isinstance(data, Mapping) else {}
    rows = None if data is None or isinstance(data, (str, Mapping)) else list(data)
    eval_rows = None if eval_data is None or isinstance(eval_data, str) else list(eval_data)
    given = {
        "path": data if isinstance(data, str) else IN_MEMORY if rows is not None else None,
        "eval_path": eval_data if isinstance(eval_data, str) else None,
        "text": text,
        "label": label,
        "template": template,
    }
    section.update({k: v for k, v in given.items() if v is not None})
    named = {"id": model} if isinstance(model, str) else dict(model or {})
    final = merge(base, {"model": named, "data": section, **sections}, where="arguments of the call")
    return _Given(final, rows, eval_rows)
