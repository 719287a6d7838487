"""``foreword tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o
from foreword.config import TuneConfig, field_docs
from foreword.errors import ForewordError
from foreword.parallel.layout import own_rank

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
    out: Annotated[Path | None, typer.Option("--out", help="Run folder: new, empty, or one to resume.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in --out.")] = False,
) -> None:
    """Search by cross-validation, then train an ensemble of the winners on all rows.

    Nothing of the rows to score on is looked at before the end; the score to expect comes from the training rows.
    """
    from rich.console import Console

    from foreword.recipe import RECIPE, load_recipe, merge

    if out is None:
        raise ForewordError("no output folder given", "command line", "add --out runs/NAME")
    base = load_recipe(out / RECIPE) if resume and (out / RECIPE).is_file() else None
    recipe = o.build_recipe(args, model, data, eval_data, text, label, template, base)
    given = {"minutes": minutes, "members": members, "ray": ray}
    recipe = merge(recipe, {"tune": {k: v for k, v in given.items() if v is not None}}, where="command line")

    from foreword.jobs.tune import tune as run

    console = Console()
    try:
        run(recipe, out, resume, console)
    except KeyboardInterrupt:
        if (out / RECIPE).is_file():
            line = f"stopped; go on with: {o.command()} tune --resume --out {out}"
            console.print(line, soft_wrap=True, highlight=False)
        raise
    if own_rank() == 0:
        from foreword.cli.show import print_run

        print_run(out, console)
