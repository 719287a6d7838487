"""``foreword multitask``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o
from foreword.cli.folder import Resume


def multitask(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE RECIPE... [key=value]...", help="A recipe a task.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder: new, empty, or one to resume.")],
    model: o.Model = None,
    resume: Resume = False,
) -> None:
    """Train one shared soft prompt, with factors for each task."""
    from rich.console import Console

    from foreword.jobs.multitask import multitask as run

    names = [a for a in recipes if "=" not in a]
    keys = [a for a in recipes if "=" in a]
    made = [(Path(n).stem, o.build_recipe([n, *keys], model, None, None, None, None, None)) for n in names]
    run(made, out, resume, Console())
