"""``foreword push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    run: Annotated[Path, typer.Argument(help="Run or adapter folder.")],
    repo: Annotated[str, typer.Argument(help="Hub id, user/name.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Who may read a new repository.")] = False,
    message: Annotated[str, typer.Option("--message", help="Commit message.")] = "Add soft prompt",
) -> None:
    """Share a run on the hub: adapter, sidecar, card and recipe."""
    from foreword.artifact.hub import push as upload

    typer.echo(upload(run, repo, private, message))
    typer.echo(f'next: foreword.load("{repo}"), or foreword evaluate {repo} --data test.csv')
