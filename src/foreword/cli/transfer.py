"""``foreword transfer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o


def transfer(
    run: Annotated[str, typer.Argument(help="Run or adapter folder, or hub id.")],
    model: Annotated[str, typer.Option("--model", help="Target: hub id, folder, .gguf, smollm2-135m.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write: new or empty.")],
    data: Annotated[str | None, typer.Option("--data", help="Rows to score on; they choose nothing.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "test",
    from_model: Annotated[str | None, typer.Option("--from-model", help="The run's own backbone, if moved.")] = None,
    device: o.Device = "auto",
) -> None:
    """Carry a soft prompt over to another backbone, without training.

    The two are of the same family.
    """
    from rich.console import Console

    from foreword.cli.combine import print_compared
    from foreword.cli.show import print_run
    from foreword.jobs.transfer import transfer_run
    from foreword.training.progress import counting

    console = Console()
    if data is None:
        done = transfer_run(run, model, out, device=device, from_model=from_model)
    else:
        with counting(console, "scoring on both models, with and without the soft prompt", None) as progress:
            done = transfer_run(run, model, out, data, split, device, from_model, progress)
    found = done.found
    console.print(
        f"map fitted on {found.tokens} shared tokens, R^2 {found.r2:.3f} on {found.held_out} others", highlight=False
    )
    if done.scored:
        print_compared(done.scored, console)
    print_run(out, console)
