"""``foreword tune``."""

from __future__ import annotations

from typing import Annotated

import typer

from foreword.cli import folder
from foreword.cli import options as o
from foreword.config import TuneConfig, field_docs
from foreword.recipe import merge

_DOCS = field_docs(TuneConfig)


def tune(
    args: o.Args = None,
    model: o.Model = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    text: o.Text = None,
    label: o.Label = None,
    template: o.Template = None,
    minutes: Annotated[float | None, typer.Option("--minutes", help=_DOCS["minutes"])] = None,
    members: Annotated[int | None, typer.Option("--members", help=_DOCS["members"])] = None,
    ray: Annotated[str | None, typer.Option("--ray", help=_DOCS["ray"])] = None,
    out: folder.Out = None,
    resume: folder.Resume = False,
) -> None:
    """Search by cross-validation, and make the winners an ensemble.

    The winners are trained on all rows. Nothing of the rows to score on is looked at before the end; the score to
    expect comes from the training rows.
    """
    out = folder.given_folder(out)
    base = folder.base_recipe(out, resume)
    recipe = o.build_recipe(args, model, data, eval_data, text, label, template, base)
    given = {"minutes": minutes, "members": members, "ray": ray}
    recipe = merge(recipe, {"tune": {k: v for k, v in given.items() if v is not None}}, where="command line")

    from foreword.jobs.tune import tune as run

    folder.carry_out("tune", run, recipe, out, resume)
