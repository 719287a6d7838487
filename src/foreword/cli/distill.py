"""``foreword distill``."""

from __future__ import annotations

from typing import Annotated

import typer

from foreword.cli import folder
from foreword.cli import options as o
from foreword.config import PromptConfig, Recipe
from foreword.recipe import merge


def distill(
    args: o.Args = None,
    model: o.Model = None,
    text: Annotated[str | None, typer.Option("--text", help="Long text that the soft prompt stands for.")] = None,
    few_shot: Annotated[int | None, typer.Option("--few-shot", help="Instead: rows of --data, in TOKENS.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows that come after the text; labels are not learnt.")
    ] = None,
    eval_data: o.EvalData = None,
    label: o.Label = None,
    template: o.Template = None,
    out: folder.Out = None,
    resume: folder.Resume = False,
) -> None:
    """Make a long text, or few-shot examples, into virtual tokens.

    They are few, and say the same.
    """
    out = folder.given_folder(out)
    own = Recipe(prompt=PromptConfig(method="cartridge", virtual_tokens=32))
    base = folder.base_recipe(out, resume, own)
    recipe = o.build_recipe(args, model, data, eval_data, None, label, template, base)
    given = {"text": text, "few_shot": few_shot}
    recipe = merge(recipe, {"distill": {k: v for k, v in given.items() if v is not None}}, where="command line")

    from foreword.jobs.distill import distill as run

    folder.carry_out("distill", run, recipe, out, resume)
