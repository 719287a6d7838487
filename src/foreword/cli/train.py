"""``foreword train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o


def train(
    args: o.Args = None,
    model: o.Model = None,
    data: o.Data = None,
    eval_data: o.EvalData = None,
    text: o.Text = None,
    label: o.Label = None,
    template: o.Template = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder: new, empty, or one to resume.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    help_keys: Annotated[bool, typer.Option("--help-keys", help="List all key=value keys and stop.")] = False,
) -> None:
    """Train a soft prompt on labelled rows, score it, and write the run folder."""
    if help_keys:
        _print_keys()
        return
    from rich.console import Console

    from foreword.errors import ForewordError
    from foreword.parallel.layout import own_rank
    from foreword.recipe import RECIPE, load_recipe

    if out is None:
        raise ForewordError("no output folder given", "command line", "add --out runs/NAME")
    base = load_recipe(out / RECIPE) if resume and (out / RECIPE).is_file() else None
    recipe = o.build_recipe(args, model, data, eval_data, text, label, template, base)

    from foreword.jobs.train import run

    console = Console()
    try:
        run(recipe, out, resume, console)
    except KeyboardInterrupt:
        if (out / "checkpoint.safetensors").is_file():
            console.print(
                f"stopped; go on with: {o.command()} train --resume --out {out}", soft_wrap=True, highlight=False
            )
        raise
    if own_rank() == 0:
        from foreword.cli.show import print_run

        print_run(out, console)


def _print_keys() -> None:
    import dataclasses

    from foreword.config import SECTIONS, field_docs

    for section, cls in SECTIONS.items():
        docs = field_docs(cls)
        default = cls()
        for f in dataclasses.fields(cls):
            typer.echo(f"{section}.{f.name}={getattr(default, f.name)!r}\n    {docs[f.name]}")
