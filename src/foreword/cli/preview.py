"""``foreword preview``: what training would see, token by token."""

from __future__ import annotations

from typing import Annotated

import typer

from foreword.cli import options as o


def preview(
    args: o.Args = None,
    model: o.Model = None,
    data: o.Data = None,
    text: o.Text = None,
    label: o.Label = None,
    template: o.Template = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 3,
) -> None:
    """Show the exact tokens of some rows, and where the loss falls.

    Loads no weights.
    """
    from rich.console import Console
    from rich.text import Text

    from foreword.checks import check

    recipe = o.build_recipe(args, model, data, None, text, label, template)
    check(recipe)
    from foreword.jobs.preview import preview as make

    found = make(recipe, rows)
    console = Console()
    console.print(f"template  {found.task.template!r}", highlight=False, markup=False, soft_wrap=True)
    for name, tokens in zip(found.task.classes, found.label_tokens, strict=True):
        console.print(f"class     {name!r} is said as {_bars(tokens)}", highlight=False, markup=False, soft_wrap=True)
    for row in found.rows:
        line = Text(f"\nrow {row.number}\n")
        line.append(_bars(row.context), style="dim")
        line.append("\nloss on  ")
        line.append(_bars(row.target), style="bold green")
        console.print(line, soft_wrap=True)
    console.print(
        f"\n{found.total} rows, {found.mean:.1f} tokens on average, {found.longest} at most; "
        "| parts tokens, and the loss falls on the target alone.",
        highlight=False,
        soft_wrap=True,
    )


def _bars(tokens: list[str]) -> str:
    return "|" + "|".join(t.replace("\n", "\\n") for t in tokens) + "|"
