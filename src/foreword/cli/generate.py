"""``foreword generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli import options as o
from foreword.cli import rows as r
from foreword.errors import ForewordError
from foreword.serving.settings import ServeSettings

if TYPE_CHECKING:
    from foreword.backbone.generate import Sampling
    from foreword.serving.bulk import Loading


def generate(
    run: Annotated[str | None, typer.Argument(help="Run, adapter folder or hub id (none with --prompts).")] = None,
    text: Annotated[
        str | None,
        typer.Argument(help='The input text, or a JSON object of columns: {"title": ...} (none with --data).'),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Rows: .csv, .jsonl, .parquet, hub id.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write for --data: .csv or .jsonl.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a hub data set.")] = "test",
    prompts: r.Prompts = None,
    prompt_column: r.PromptColumn = None,
    resume: r.Resume = False,
    engine: r.EngineName = r.DEFAULT.engine,
    vllm_url: r.VllmUrl = "",
    vllm_python: r.VllmPython = "",
    kv_memory: r.KvMemory = r.DEFAULT.kv_memory,
    in_flight: r.InFlight = r.IN_FLIGHT,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="0: no limit.")] = 0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", min=0.01, help="1: none.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    model: o.Base = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    force: o.Force = False,
) -> None:
    """Write text after one input, streamed as it comes.

    With --data, text is written after each of its rows, as a column 'generated' of --out.
    """
    settings = ServeSettings(
        model=model or "", prompts=tuple(prompts or ()), engine=engine, vllm_url=vllm_url, vllm_python=vllm_python,
        dtype=dtype, device=device, kv_memory=kv_memory,
    )  # fmt: skip
    from foreword.backbone.generate import Sampling
    from foreword.serving import bulk

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    loading = bulk.Loading(model, device, dtype, revision, force)
    if data is None:
        if prompts or out or resume:
            raise ForewordError("no rows given", "command line", "add --data; or give a run and a text alone")
        _stream(run, text, loading, sampling)
        return
    if text is not None or out is None:
        what, fix = ("a text and --data", "give one of them") if out else ("no output file given", "add --out FILE")
        raise ForewordError(what, "command line", fix)
    r.check_one_or_many(run, prompt_column, settings)
    with r.opened(data, split, out, resume, in_flight) as files:
        if run is not None:
            bulk.generate_run(run, loading, settings, sampling, files)
        else:
            bulk.generate_named(settings, prompt_column, force, sampling, files)


def _stream(run: str | None, text: str | None, loading: Loading, sampling: Sampling) -> None:
    if run is None or text is None:
        raise ForewordError("no text given", "command line", "give a run and a text, or a run and --data")
    for piece in loading.load(run).stream(_row(text), sampling):
        typer.echo(piece, nl=False)
    typer.echo()


def _row(text: str) -> dict[str, str] | str:
    """Columns from a JSON object; anything else is the text itself."""
    import json

    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            return text
        if isinstance(found, dict):
            return {str(k): str(v) for k, v in found.items()}
    return text
