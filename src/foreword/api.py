"""The Python interface: ``foreword.train`` and ``foreword.load``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from foreword.config import Recipe
from foreword.jobs.load import Foreword, Prediction, load, open_run
from foreword.jobs.train import run
from foreword.recipe import load_recipe, merge
from foreword.records import Row

__all__ = ["Foreword", "Prediction", "load", "train"]
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
    nested = {
        "model": {"id": model} if isinstance(model, str) else dict(model or {}),
        "data": section,
        "prompt": dict(prompt or {}),
        "train": dict(train or {}),
    }
    final = merge(base, nested, where="foreword.train arguments")
    backbone = run(final, Path(out), resume, Console(quiet=quiet), rows, eval_rows)
    return open_run(Path(out), backbone)
