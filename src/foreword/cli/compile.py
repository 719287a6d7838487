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
    """Read a soft prompt once and write its keys and values: the same soft prompt, free at every request."""
    from rich.console import Console

    from foreword.cli.show import print_run
    from foreword.jobs.derive import compile_run

    compile_run(run, out, model, device)
    print_run(out, Console())
