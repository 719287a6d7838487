"""``foreword compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o


def compile_(
    run: Annotated[str, typer.Argument(help="Run or adapter folder, or hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write: new or empty.")],
    model: o.Base = None,
    device: o.Device = "auto",
) -> None:
    """Write a soft prompt's keys and values: free at every request.

    It is the same soft prompt, read once.
    """
    from rich.console import Console

    from foreword.cli.show import print_run
    from foreword.jobs.derive import compile_run

    compile_run(run, out, model, device)
    print_run(out, Console())
