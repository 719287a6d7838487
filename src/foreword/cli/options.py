"""Options that several verbs share, and how they become a recipe."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from foreword.config import Recipe
from foreword.data.raft import filled_in
from foreword.errors import ForewordError
from foreword.recipe import merge, parse_overrides, read_recipe_file

Args = Annotated[
    list[str] | None, typer.Argument(metavar="[RECIPE] [key=value]...", help="A recipe (file or packaged name), keys.")
]
Model = Annotated[str | None, typer.Option("--model", help="Backbone: hub id, folder, .gguf, smollm2-135m.")]
Data = Annotated[str | None, typer.Option("--data", help="Rows: .csv, .jsonl, .parquet, hub id, RAFT folder.")]
EvalData = Annotated[str | None, typer.Option("--eval-data", help="Held-out rows to score on.")]
Text = Annotated[str | None, typer.Option("--text", help="Input column.")]
Label = Annotated[str | None, typer.Option("--label", help="Label column.")]
Template = Annotated[str | None, typer.Option("--template", help='Context, such as "Tweet : {text} Label :".')]
Device = Annotated[str, typer.Option("--device", help="auto, cuda, cuda:N, mps, cpu.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16.")]
Base = Annotated[
    str | None, typer.Option("--model", help="Backbone, when the adapter's name for it does not lead to it.")
]
Force = Annotated[bool, typer.Option("--force", help="Use another backbone than it was trained for.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Revision of a hub adapter.")]


def command() -> str:
    """How this program can be called again from here: not everybody has it on the path."""
    program = Path(sys.argv[0])
    if shutil.which("foreword"):
        return "foreword"
    return str(program) if program.name == "foreword" else "python -m foreword"


def build_recipe(
    args: list[str] | None,
    model: str | None,
    data: str | None,
    eval_data: str | None,
    text: str | None,
    label: str | None,
    template: str | None,
    base: Recipe | None = None,
) -> Recipe:
    """Defaults < what a RAFT task folder brings < recipe < command line."""
    recipe = base or Recipe()
    named = [a for a in args or [] if "=" not in a]
    if len(named) > 1:
        raise ForewordError(
            f"{len(named)} recipes given: {', '.join(named)}", "command line", "give one; keys are written key=value"
        )
    for name in named:
        path = find_recipe(name)
        recipe = merge(recipe, read_recipe_file(path), where=str(path))
    recipe = merge(recipe, parse_overrides([a for a in args or [] if "=" in a]), where="command line")
    given = {"path": data, "eval_path": eval_data, "text": text, "label": label, "template": template}
    options = {"model": {"id": model} if model else {}, "data": {k: v for k, v in given.items() if v is not None}}
    recipe = merge(recipe, options, where="command line")
    return replace(recipe, data=filled_in(recipe.data))


def find_recipe(name: str) -> Path:
    """A recipe file, or a packaged recipe by name."""
    from foreword.cli.recipes import packaged
    from foreword.errors import nearest

    if Path(name).is_file():
        return Path(name)
    known = packaged()
    if name in known:
        return known[name]
    raise ForewordError(
        f"no recipe '{name}'", "command line", nearest(name, known) or f"packaged: {', '.join(sorted(known))}"
    )
