"""What the verbs that train in a run folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from foreword.cli.options import command
from foreword.config import Recipe
from foreword.errors import ForewordError
from foreword.parallel.layout import own_rank
from foreword.recipe import RECIPE, load_recipe

Out = Annotated[Path | None, typer.Option("--out", help="Run folder: new, empty, or one to resume.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]


def given_folder(out: Path | None) -> Path:
    """``--out``, which has no default: a run is kept where its user wants it."""
    if out is None:
        raise ForewordError("no output folder given", "command line", "add --out runs/NAME")
    return out


def base_recipe(out: Path, resume: bool, default: Recipe | None = None) -> Recipe:
    """What the command line goes over: the recipe of the run that is resumed, else the verb's own."""
    begun = resume and (out / RECIPE).is_file()
    return load_recipe(out / RECIPE) if begun else default or Recipe()


def carry_out(verb: str, run: Callable[..., Any], recipe: Recipe, out: Path, resume: bool) -> None:
    """Runs a job in its folder and shows what came out; interrupted, it says how to go on."""
    from rich.console import Console

    from foreword.cli.show import print_run

    console = Console()
    try:
        run(recipe, out, resume, console)
    except KeyboardInterrupt:
        if (out / RECIPE).is_file() and own_rank() == 0:
            line = f"stopped; go on with: {command()} {verb} --resume --out {out}"
            console.print(line, soft_wrap=True, highlight=False)
        raise
    if own_rank() == 0:
        print_run(out, console)
