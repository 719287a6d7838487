"""``foreword predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o
from foreword.cli import rows as r
from foreword.data.raft import ID, RaftTask, read_task
from foreword.errors import ForewordError
from foreword.serving.settings import ServeSettings


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="[RUN] ROWS",
            help="Run, adapter or ensemble folder, or hub id (none with --prompts); .csv, .jsonl, .parquet, hub id or "
            "RAFT task folder.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write: .csv or .jsonl.")],
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "test",
    raft: Annotated[
        bool, typer.Option("--raft", help="Rows are a RAFT task folder: write ID,Label of its test.")
    ] = False,
    prompts: r.Prompts = None,
    prompt_column: r.PromptColumn = None,
    resume: r.Resume = False,
    engine: r.EngineName = r.DEFAULT.engine,
    vllm_url: r.VllmUrl = "",
    vllm_python: r.VllmPython = "",
    kv_memory: r.KvMemory = r.DEFAULT.kv_memory,
    in_flight: r.InFlight = r.IN_FLIGHT,
    model: o.Base = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    force: o.Force = False,
) -> None:
    """Classify rows: adds their label and probabilities as columns.

    There is one column of probabilities a class.

    With --prompts each row is classified by the soft prompt it names: label, its probability p, all probabilities.

    With --raft the rows are the unlabelled test of a RAFT task folder, and the file is what RAFT takes: ID and Label.
    """
    *runs, rows = inputs
    if len(runs) > 1:
        raise ForewordError(f"{len(inputs)} arguments: {' '.join(inputs)}", "command line", "give a run and its rows")
    run = runs[0] if runs else None
    settings = ServeSettings(
        model=model or "", prompts=tuple(prompts or ()), engine=engine, vllm_url=vllm_url, vllm_python=vllm_python,
        dtype=dtype, device=device, kv_memory=kv_memory,
    )  # fmt: skip
    r.check_one_or_many(run, prompt_column, settings)
    task = _raft_task(run, rows, split, out) if raft else None
    with r.opened(rows, split, out, resume, in_flight, (ID,) if task else None) as files:
        from foreword.serving import bulk

        loading = bulk.Loading(model, device, dtype, revision, force)
        if run is not None and task is not None:
            bulk.predict_raft(run, loading, task, files)
        elif run is not None:
            bulk.predict_run(run, loading, files)
        else:
            bulk.predict_named(settings, prompt_column, force, files)


def _raft_task(run: str | None, folder: str, split: str, out: Path) -> RaftTask:
    """The task of --raft; refuses what does not go with it."""
    where = "command line"
    if run is None:
        raise ForewordError("--raft and --prompts", where, "name the run that answers the task")
    if split != "test":
        raise ForewordError(f"--raft and --split {split}", where, "leave --split out: RAFT wants its test's rows")
    if out.suffix != ".csv":
        raise ForewordError(f"RAFT takes a .csv, not '{out.suffix or out.name}'", str(out), "name a .csv file")
    return read_task(Path(folder).expanduser())
