"""``foreword export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[str, typer.Argument(help="Run or adapter folder, or hub id.")],
    file: Annotated[Path, typer.Argument(help="New: a .pt or .npy file, or a folder (no suffix).")],
    task: Annotated[int | None, typer.Option("--task", help="Whose, of an adapter of several tasks.")] = None,
) -> None:
    """Write a soft prompt for other tools: bare rows or plain PEFT."""
    from rich.console import Console

    from foreword.jobs.export import export as run_export

    adapter = run_export(run, file, task)
    console = Console()
    lines = [f"written {file}"]
    if adapter.sidecar:
        task_ = adapter.sidecar.task
        place = "" if task_.placement == "front" else f", placement {task_.placement}"
        lines.append(f"it does not say its template: {task_.template!r}{place}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
