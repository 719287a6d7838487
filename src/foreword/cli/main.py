"""The entry point: verbs, and errors as three lines with exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Annotated

import typer

from foreword.cli import (
    combine,
    compile,
    demo,
    distill,
    evaluate,
    export,
    generate,
    multitask,
    predict,
    preview,
    push,
    recipes,
    serve,
    show,
    train,
    transfer,
    tune,
)
from foreword.errors import ForewordError
from foreword.parallel.layout import own_rank
from foreword.versions import library_versions

SPEAK_SECONDS = 10.0  # on a loaded machine processes that start at once are seconds apart

app = typer.Typer(
    name="foreword",
    help="Train, score, share and use soft prompts for frozen causal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Errors say what, where and how to mend it; --debug anywhere adds the traceback.",
)
for verb in (demo.demo, train.train, tune.tune, evaluate.evaluate, predict.predict, generate.generate, preview.preview,
             show.show, serve.serve, compile.compile_, combine.combine, transfer.transfer, distill.distill,
             multitask.multitask, export.export, push.push):  # fmt: skip
    app.command(verb.__name__.rstrip("_"))(verb)
app.add_typer(recipes.app, name="recipes")


def _print_versions(asked: bool) -> None:
    if asked:
        typer.echo("\n".join(f"{name} {version}" for name, version in library_versions().items()))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_versions, help="Versions that matter; exit.")
    ] = False,
) -> None:
    """What can be asked of the program itself, before any verb."""


def main() -> None:
    """Runs the command line; the console script."""
    debug = "--debug" in sys.argv
    argv = [a for a in sys.argv[1:] if a != "--debug"]
    _log_to_stderr()
    try:
        app(args=argv)
    except ForewordError as e:
        if debug:
            raise
        if own_rank():  # the same error is the first process's, mostly; torchrun ends us once that has spoken
            time.sleep(SPEAK_SECONDS)
        sys.stderr.write(f"{e}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _log_to_stderr() -> None:
    """Foreword's own notes go to stderr as plain lines; other libraries keep their ways."""
    log = logging.getLogger("foreword")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    # torchao, which transformers imports where it is installed, lists the CUDA libraries it cannot load, and torch
    # remarks on how torchao registers its classes.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
