"""``foreword generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from foreword.cli import options as o


def generate(
    run: Annotated[str, typer.Argument(help="Run or adapter folder, or hub id.")],
    text: Annotated[str, typer.Argument(help='The input text, or a JSON object of columns: {"title": ...}.')],
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
    """Write text after one input, streamed as it comes."""
    from foreword.backbone.generate import Sampling
    from foreword.jobs.load import load

    task = load(run, model=model, device=device, dtype=dtype, revision=revision, force=force)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
    for piece in task.stream(_row(text), sampling):
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
