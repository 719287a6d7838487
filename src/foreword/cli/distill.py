"""``foreword distill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o


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
    out: Annotated[Path | None, typer.Option("--out", help="Run folder: new, empty, or one to resume.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Make a long text, or few-shot examples, into a few virtual tokens that say the same."""
    from rich.console import Console

    from foreword.cli.show import print_run
    from foreword.config import PromptConfig, Recipe
    from foreword.errors import ForewordError
    from foreword.recipe import RECIPE, load_recipe, merge

    if out is None:
        raise ForewordError("no output folder given", "command line", "add --out runs/NAME")
    started = resume and (out / RECIPE).is_file()
    base = load_recipe(out / RECIPE) if started else Recipe(prompt=PromptConfig(method="cartridge", virtual_tokens=32))
    recipe = o.build_recipe(args, model, data, eval_data, None, label, template, base)
    given = {"text": text, "few_shot": few_shot}
    recipe = merge(recipe, {"distill": {k: v for k, v in given.items() if v is not None}}, where="command line")

    from foreword.jobs.distill import distill as run

    console = Console()
    run(recipe, out, resume, console)
    print_run(out, console)
