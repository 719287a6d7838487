"""``foreword predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foreword.cli import options as o


def predict(
    run: Annotated[str, typer.Argument(help="Run or adapter folder, or hub id.")],
    rows: Annotated[str, typer.Argument(help="Rows: .csv, .jsonl, .parquet, hub id.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .csv or .jsonl.")],
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "test",
    model: o.Base = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    force: o.Force = False,
) -> None:
    """Classify rows: input columns, label, and one probability column a class."""
    from rich.console import Console

    from foreword.artifact.atomic import write_atomic
    from foreword.data.sources import read_table
    from foreword.errors import ForewordError
    from foreword.jobs.load import load
    from foreword.training.progress import counting

    if out.suffix not in (".csv", ".jsonl"):
        raise ForewordError(f"cannot write '{out.suffix or out.name}'", str(out), "name a .csv or .jsonl file")
    if not out.absolute().parent.is_dir():
        raise ForewordError("there is no such folder", str(out.parent), f"mkdir -p {out.parent}")
    table = read_table(rows, split)
    task = load(run, model=model, device=device, dtype=dtype, revision=revision, force=force)
    console = Console()
    with counting(console, "predicting", len(table)) as progress:
        predictions = task.predict(table.rows, progress)
    label = "predicted_label" if "label" in table.columns else "label"
    columns = [*table.columns, label, *(f"p({c})" for c in task.task.classes)]
    records = [
        [*row.values(), p.label, *(round(x, 6) for x in p.probabilities.values())]
        for row, p in zip(table.rows, predictions, strict=True)
    ]
    write_atomic(out, _as_text(columns, records, out.suffix).encode())
    console.print(f"{len(records)} rows written to {out}", highlight=False, soft_wrap=True)


def _as_text(columns: list[str], records: list[list[Any]], suffix: str) -> str:
    import csv
    import io
    import json

    if suffix == ".jsonl":
        rows = (dict(zip(columns, r, strict=True)) for r in records)
        return "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in rows)
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([columns, *records])
    return file.getvalue()
