"""What predict and generate over a file of rows have in common."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli import options as o
from foreword.config import field_docs
from foreword.errors import ForewordError
from foreword.serving.settings import ServeSettings, check_settings

if TYPE_CHECKING:
    from foreword.serving.bulk import Files

_DOCS, DEFAULT = field_docs(ServeSettings), ServeSettings()

Prompts = Annotated[list[str] | None, typer.Option("--prompts", help=_DOCS["prompts"])]
PromptColumn = Annotated[
    str | None, typer.Option("--prompt-column", help="Column that names each row's soft prompt of --prompts.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a stopped run of the same job ended.")]
EngineName = Annotated[str, typer.Option("--engine", help=_DOCS["engine"])]
VllmUrl = Annotated[str, typer.Option("--vllm-url", help=_DOCS["vllm_url"])]
VllmPython = Annotated[str, typer.Option("--vllm-python", help=_DOCS["vllm_python"])]
KvMemory = Annotated[int, typer.Option("--kv-memory", min=0, help=_DOCS["kv_memory"])]
InFlight = Annotated[int, typer.Option("--in-flight", min=1, help="Rows in the engine at once.")]
IN_FLIGHT = 64


@contextmanager
def opened(
    rows: str, split: str, out: Path, resume: bool, in_flight: int, kept: tuple[str, ...] | None = None
) -> Iterator[Files]:
    """The rows, once it is sure that their results can be written; upon Ctrl-C, says how to go on.

    ``kept``: their columns that results begin with; None: all.
    """
    from rich.console import Console

    from foreword.data.sources import read_table
    from foreword.serving.results import check_target, partial_of

    check_target(out, resume)
    table = read_table(rows, split)
    from foreword.serving.bulk import Files

    try:
        yield Files(table, out, resume, Console(), in_flight, kept)
    except KeyboardInterrupt:
        if partial_of(out).exists():
            again = [*sys.argv[1:], *([] if "--resume" in sys.argv else ["--resume"])]
            typer.echo(f"stopped; go on with: {o.command()} {shlex.join(again)}")
        raise


def check_one_or_many(run: str | None, column: str | None, settings: ServeSettings) -> None:
    """Refuses what contradicts itself, before anything is loaded."""
    where, many = "command line", settings.prompts
    if run is None and not many:
        raise ForewordError("no soft prompt given", where, "name a run, or --prompts FOLDER --prompt-column COLUMN")
    if run is not None and many:
        raise ForewordError(f"a run ({run}) and --prompts", where, "give one of them")
    if run is not None and (column is not None or settings.engine != DEFAULT.engine):
        option = "--prompt-column" if column is not None else f"--engine {settings.engine}"
        raise ForewordError(f"{option} says nothing to a single run", where, f"give --prompts {run} instead of it")
    if many:
        check_settings(settings)
