"""``foreword recipes list | show | copy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.errors import ForewordError, nearest

app = typer.Typer(help="List, show and copy the packaged recipes.", no_args_is_help=True, rich_markup_mode=None)
FOLDER = Path(__file__).parent.parent / "recipes"
Name = Annotated[str, typer.Argument(help="A packaged recipe.")]


def packaged() -> dict[str, Path]:
    """Packaged recipes by name."""
    return {p.stem: p for p in sorted(FOLDER.glob("*.yaml"))}


@app.command(name="list")
def list_() -> None:
    """List the packaged recipes."""
    for name, path in packaged().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name:22} {first}")


@app.command()
def show(name: Name) -> None:
    """Print a recipe in full: every key, its meaning and its value."""
    from foreword.recipe import load_recipe, to_yaml

    path = _find(name)
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    typer.echo("\n".join([*header, to_yaml(load_recipe(path))]), nl=False)


@app.command()
def copy(
    name: Name, to: Annotated[Path | None, typer.Argument(help="File to write; NAME.yaml when left out.")] = None
) -> None:
    """Copy a recipe, in full, to a file of your own."""
    from foreword.artifact.atomic import write_atomic
    from foreword.recipe import load_recipe, to_yaml

    target = to or Path(f"{name}.yaml")
    if target.exists():
        raise ForewordError("the file exists", str(target), "name another: foreword recipes copy NAME FILE")
    write_atomic(target, to_yaml(load_recipe(_find(name))).encode())
    typer.echo(f"{target}\nnext: foreword train {target} --out runs/{name}")


def _find(name: str) -> Path:
    known = packaged()
    if name not in known:
        raise ForewordError(f"no packaged recipe '{name}'", "command line", nearest(name, known) or ", ".join(known))
    return known[name]
