"""``foreword demo``: the main job on the bundled data, offline."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

SENTENCES = (
    "The replacement charger you posted stopped working on its second day.",
    "Which of your shops is open on Sunday afternoon?",
    "I was sure I would miss my connection, and your conductor held it for me.",
)


def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; the first free runs/demo-N.")] = None,
    model: Annotated[str, typer.Option("--model", help="Backbone.")] = "smollm2-135m",
) -> None:
    """Train on 50 bundled rows, score on 100 others, predict three.

    The rows are messages of customers to companies, made for Foreword. Needs no network once the model is there.
    """
    import time

    from rich.console import Console

    from foreword.cli.recipes import packaged
    from foreword.cli.show import print_run
    from foreword.recipe import load_recipe, merge

    console = Console()
    began = time.monotonic()
    folder = out or next(p for p in (Path(f"runs/demo-{n}") for n in count(1)) if not p.exists())
    recipe = merge(load_recipe(packaged()["demo"]), {"model": {"id": model}}, where="demo")
    console.print("Foreword demo: is a customer's message a complaint? 50 rows to learn from, a frozen model.")
    console.print("(The first run converts the model into a cache, which takes about half a minute.)\n")

    from foreword.jobs.load import open_run
    from foreword.jobs.train import run

    task = open_run(folder, run(recipe, folder, console=console))
    console.print("\nthree new messages", highlight=False)
    for sentence, p in zip(SENTENCES, task.predict(SENTENCES), strict=True):
        console.print(f"  {p.label:13} {p.probabilities[p.label]:.2f}  {sentence}", highlight=False, soft_wrap=True)
    console.print()
    print_run(folder, console)
    console.print(f"{'':6}read the model card: {folder / 'README.md'}", highlight=False, soft_wrap=True)
    console.print(f"\ndone in {time.monotonic() - began:.0f} s", highlight=False)
