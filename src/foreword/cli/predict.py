"""``foreword predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foreword.cli import options as o
from foreword.cli import rows as r
from foreword.errors import ForewordError
from foreword.serving.settings import ServeSettings


def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="[RUN] ROWS",
            help="Run, adapter or ensemble folder, or hub id (none with --prompts); .csv, .jsonl, .parquet or hub id.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write: .csv or .jsonl.")],
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "test",
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
    """Classify rows: input columns, label, and one probability column a class.

    With --prompts each row is classified by the soft prompt it names: label, its probability p, all probabilities.
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
    with r.opened(rows, split, out, resume, in_flight) as files:
        from foreword.serving import bulk

        if run is not None:
            bulk.predict_run(run, bulk.Loading(model, device, dtype, revision, force), files)
        else:
            bulk.predict_named(settings, prompt_column, force, files)
