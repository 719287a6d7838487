"""``foreword train``."""

from __future__ import annotations

from typing import Annotated

import typer

from foreword.cli import folder
from foreword.cli import options as o


def train(
    args: o.Args = None,
    model: o.Model = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    text: o.Text = None,
    label: o.Label = None,
    template: o.Template = None,
    out: folder.Out = None,
    resume: folder.Resume = False,
    help_keys: Annotated[bool, typer.Option("--help-keys", help="List all key=value keys and stop.")] = False,
) -> None:
    """Train a soft prompt on labelled rows, score it, write the run."""
    if help_keys:
        _print_keys()
        return
    out = folder.given_folder(out)
    base = folder.base_recipe(out, resume)
    recipe = o.build_recipe(args, model, data, eval_data, text, label, template, base)

    from foreword.jobs.train import run

    folder.carry_out("train", run, recipe, out, resume)


def _print_keys() -> None:
    import dataclasses

    from foreword.config import SECTIONS, field_docs

    for section, cls in SECTIONS.items():
        docs = field_docs(cls)
        default = cls()
        for f in dataclasses.fields(cls):
            typer.echo(f"{section}.{f.name}={getattr(default, f.name)!r}\n    {docs[f.name]}")
