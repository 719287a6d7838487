"""``foreword show``: a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreword.cli.options import command

if TYPE_CHECKING:
    from rich.console import Console

    from foreword.records import Task


def show(run: Annotated[str, typer.Argument(help="Run or adapter folder, or hub id.")]) -> None:
    """Show a run: task, backbone, scores with baselines, files."""
    from rich.console import Console

    from foreword.artifact.hub import locate

    print_run(locate(run), Console())


def print_run(folder: Path, console: Console) -> None:
    """Prints what the folder holds and what to do with it."""
    from foreword.artifact.ensemble import is_ensemble
    from foreword.artifact.folder import CONFIG, LEGACY_WEIGHTS, WEIGHTS, read_adapter
    from foreword.artifact.sidecar import SIDECAR
    from foreword.report.page import REPORT

    if is_ensemble(folder):
        print_ensemble(folder, console)
        return
    adapter = read_adapter(folder)
    sidecar, prompt = adapter.sidecar, adapter.prompt
    files = [folder / f for f in (CONFIG, WEIGHTS, LEGACY_WEIGHTS, SIDECAR, "README.md") if (folder / f).is_file()]
    files = [folder] if folder.is_file() else files
    weights = files[0] if folder.is_file() else next(f for f in files if f.name in (WEIGHTS, LEGACY_WEIGHTS))
    facts = {
        "soft prompt": f"{prompt.tokens} virtual tokens{_what(adapter.config)}, {prompt.values.shape[1]} numbers each",
        "backbone": sidecar.backbone["name"] if sidecar else adapter.config.get("base_model_name_or_path"),
        "folder": f"{folder} ({weights.name} {weights.stat().st_size:,} bytes)",
    }
    if sidecar:
        facts.update(_task_facts(sidecar.task))
        seconds, steps = sidecar.training.get("seconds"), sidecar.training.get("steps")
        if "how" in sidecar.training:
            facts["made"] = f"{sidecar.training['how']} from {', '.join(sidecar.training['from'])}"
        elif sidecar.untrained:
            facts["training"] = f"none: {sidecar.training.get('rows')} rows chose wording and biases"
        else:
            facts["training"] = f"{sidecar.training.get('rows')} rows, {steps} steps, {seconds} s"
    if (folder / REPORT).is_file():
        facts["report"] = folder / REPORT
    _print_facts(facts, console)
    if sidecar and sidecar.scores:
        print_scores(sidecar.scores, console)
    elif sidecar:
        console.print("not scored: give --eval-data, data.eval_fraction=0.2 or data.folds=5", highlight=False)
    _print_next(folder, bool(sidecar and sidecar.task.classifies), console)


def print_ensemble(folder: Path, console: Console) -> None:
    """Prints an ensemble's members, its scores, and what it expects where it was tuned."""
    import json

    from foreword.artifact.hub import members_of
    from foreword.artifact.sidecar import read_sidecar
    from foreword.jobs.tuned import TUNED
    from foreword.report.page import REPORT

    members, sidecar = members_of(folder), read_sidecar(folder)
    facts: dict[str, Any] = {"ensemble": f"{len(members)} soft prompts, label probabilities averaged", "folder": folder}
    if sidecar:
        facts.update({"backbone": sidecar.backbone["name"], **_task_facts(sidecar.task)})
    if (folder / REPORT).is_file():
        facts["report"] = folder / REPORT
    _print_facts(facts, console)
    if sidecar:
        names = sidecar.training.get("members", [])
        for name in dict.fromkeys(names):
            console.print(f"{'':12} {names.count(name)} x {name}", highlight=False, markup=False, soft_wrap=True)
    if sidecar and sidecar.scores:
        print_scores(sidecar.scores, console)
    if (folder / TUNED).is_file():
        expected = json.loads((folder / TUNED).read_text())["expected"]
        low, high = expected["intervals"]["accuracy"]
        line = f"to expect on new rows: accuracy {expected['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        console.print(f"{line} (cross-validated on the {expected['n']} training rows)", highlight=False, markup=False,
                      soft_wrap=True)  # fmt: skip
    _print_next(folder, True, console, ensemble=True)


def _task_facts(task: Task) -> dict[str, str]:
    """A template's line ends as ``\\n``; label words where they are not the classes' names."""
    facts = {"template": task.template.replace("\n", "\\n")}
    if task.classifies:
        facts["classes"] = ", ".join(task.classes)
    if any(word != name.replace("_", " ") for word, name in zip(task.words, task.classes, strict=True)):
        facts["label words"] = ", ".join(task.words)
    if task.biases:
        facts["class bias"] = ", ".join(f"{b:+.2f}" for b in task.biases)
    return facts


def _print_facts(facts: Mapping[str, Any], console: Console) -> None:
    for name, value in facts.items():
        console.print(f"{name:12} {value}", highlight=False, markup=False, soft_wrap=True)


def _what(config: Mapping[str, Any]) -> str:
    names = {"PROMPT_TUNING": "", "FOREWORD_PLACED": " placed in the text"}
    return names.get(config["peft_type"], f" ({config['peft_type']})")


def print_scores(scores: Any, console: Console) -> None:
    """The table of scores with intervals, beside the baselines."""
    from rich.table import Table

    from foreword.report.card import rows_scored, score_columns, score_rows

    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    columns = score_columns(scores)
    for i, name in enumerate(("", *(title for _, title in columns))):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0)
    before = "\n\\[" if len(columns) > 3 else " \\["  # four scores and their intervals side by side are too wide
    for row in score_rows(scores):
        table.add_row(*(cell.replace(" [", before) for cell in row))
    console.print()
    console.print(table)
    console.print(
        f"{rows_scored(scores)} ({scores['protocol']}); 95 % intervals", highlight=False, markup=False, soft_wrap=True
    )
    console.print()


def _print_next(folder: Path, classifies: bool, console: Console, ensemble: bool = False) -> None:
    verbs = ["evaluate {} --data test.csv", "predict {} rows.csv --out predictions.csv"] if classifies else []
    verbs += [*([] if ensemble else ['generate {} "some text"']), "push {} user/name"]
    for i, verb in enumerate(verbs):
        line = f"{'next:' if i == 0 else '':6}{command()} {verb.format(folder)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
