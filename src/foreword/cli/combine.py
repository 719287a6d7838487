"""``foreword combine``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli import options as o

if TYPE_CHECKING:
    from rich.console import Console

    from foreword.jobs.derive import Scored


def combine(
    runs: Annotated[list[str], typer.Argument(metavar="A B [C]...", help="Runs, adapter folders, hub ids.")],
    how: Annotated[str, typer.Option("--how", help="average, concatenate, interpolate, ensemble.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write: new or empty.")],
    weight: Annotated[float | None, typer.Option("--weight", help="Share of B when interpolating; 0.5.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Rows to score all on; they choose nothing.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "test",
    model: o.Base = None,
    device: o.Device = "auto",
) -> None:
    """Make one soft prompt, or an ensemble, of several.

    They are of the same backbone, and the task is the first one's.

    An ensemble keeps them apart: classifiers of the same classes in one folder, whose probabilities are averaged.
    """
    from rich.console import Console

    if how == "ensemble":
        write_together(runs, out, weight, data)
        return
    from foreword.cli.show import print_run
    from foreword.jobs.combine import combine_runs
    from foreword.training.progress import counting

    console = Console()
    if data is None:
        combine_runs(runs, how, out, weight, model=model, device=device)
    else:
        with counting(console, "scoring every source and the result, with and without", None) as progress:
            scored = combine_runs(runs, how, out, weight, data, split, model, device, progress)
        print_compared(scored, console)
    print_run(out, console)


def write_together(runs: Sequence[str], out: Path, weight: float | None, data: str | None) -> None:
    """Writes the folder of an ensemble."""
    from foreword.artifact.ensemble import write_ensemble
    from foreword.artifact.hub import locate
    from foreword.errors import ForewordError

    if weight is not None or data is not None:
        given = "--data" if weight is None else "--weight"
        raise ForewordError(f"{given} says nothing to an ensemble", given, "leave it out; predict and serve run it")
    write_ensemble(out, [locate(r) for r in runs])
    typer.echo(f"{len(runs)} members written to {out}")


def print_compared(scored: Sequence[Scored], console: Console) -> None:
    """A line for everybody: accuracy or exact match, and loss, with their intervals."""
    from rich.markup import escape
    from rich.table import Table

    from foreword.report.card import score_columns, score_rows

    (_, main), *_ = score_columns(scored[0].scores)
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    table.add_column(main, justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    for who in scored:
        _, reached, *_, loss = score_rows(who.scores)[0]
        table.add_row(escape(who.name), escape(reached), escape(loss))
    console.print()
    console.print(table)
    console.print()
