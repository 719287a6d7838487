"""``foreword evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o


def evaluate(
    run: Annotated[str, typer.Argument(help="Run, adapter or ensemble folder, or hub id.")],
    data: Annotated[str, typer.Option("--data", help="Labelled rows: .csv, .jsonl, .parquet, hub id.")],
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "test",
    json_: Annotated[Path | None, typer.Option("--json", help="Write all scores to this file.")] = None,
    drop_incomplete: Annotated[bool, typer.Option("--drop-incomplete", help="Leave out rows with gaps.")] = False,
    model: o.Base = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    force: o.Force = False,
) -> None:
    """Score a soft prompt on labelled rows, beside its baselines.

    Those are the majority class and the plain backbone.
    """
    import json

    from rich.console import Console

    from foreword.artifact.atomic import write_atomic
    from foreword.cli.show import print_scores
    from foreword.jobs.ensemble import load_any
    from foreword.training.progress import counting

    console = Console()
    task = load_any(run, model=model, device=device, dtype=dtype, revision=revision, force=force)
    with counting(console, "scoring, with and without the soft prompt", None) as progress:
        scores = task.evaluate(data, split, drop_incomplete, progress)
    print_scores(scores, console)
    if json_ is not None:
        write_atomic(json_, (json.dumps(scores, indent=2, ensure_ascii=False) + "\n").encode())
        console.print(f"written {json_}", highlight=False, soft_wrap=True)
