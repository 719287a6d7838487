"""The model card (README.md) of an adapter folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from foreword.artifact.peft_types import PLACED
from foreword.artifact.sidecar import Sidecar
from foreword.backbone.source import SMOLLM2
from foreword.data.template import parse
from foreword.hub_errors import HUB_ID


def model_card(adapter: Mapping[str, Any], sidecar: Sidecar) -> str:
    """The card: what it is, template and label words, scores with intervals, how to load it."""
    base = str(sidecar.backbone["name"])
    library = "foreword" if adapter["peft_type"] == PLACED else "peft"
    task = sidecar.task
    lines = [
        *_front(library, "prompt-tuning", base),
        "# Soft prompt", "",
        f"{adapter['num_virtual_tokens']} virtual tokens ({_kind(adapter)}) for the frozen model "
        f"`{base}`, {_origin(sidecar)}.", "",
        "## Template", "", *_fenced(f"{task.template}{task.separator}<target>", "text"), "",
        *_classes(sidecar), *_scores(sidecar.scores), *_usage(adapter, sidecar, base), *_training(sidecar),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def ensemble_card(members: Sequence[str], sidecar: Sidecar) -> str:
    """The card of an ensemble's folder: its members, template, label words, scores, how to load it."""
    base = str(sidecar.backbone["name"])
    task = sidecar.task
    row = json.dumps({f.column: "..." for f in parse(task.template).fields}, ensure_ascii=False)
    ours = f'import foreword\ntask = foreword.load("<this folder or repository>")\nprint(task.predict([{row}]))'
    lines = [
        *_front("foreword", "ensemble", base),
        "# Ensemble of soft prompts", "",
        f"{len(members)} soft prompts for the frozen model `{base}`, {_origin(sidecar)}. Their label probabilities are "
        "averaged. Each folder under `members` is an adapter by itself.", "",
        *[f"{i}. {_code(m)}" for i, m in enumerate(members)], "",
        "## Template", "", *_fenced(f"{task.template}{task.separator}<target>", "text"), "",
        *_classes(sidecar), *_scores(sidecar.scores), "## Use", "", *_fenced(ours, "python"), "", *_training(sidecar),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _front(library: str, tag: str, base: str) -> list[str]:
    """The hub's YAML; the base is named where it is a hub model."""
    front: dict[str, Any] = {"library_name": library, "tags": ["foreword", "soft-prompt", tag]}
    if HUB_ID.fullmatch(base) and not Path(base).exists():  # folders may look like ids: models/llama
        front["base_model"] = base
    return ["---", yaml.safe_dump(front, sort_keys=True).rstrip(), "---", ""]


def _kind(adapter: Mapping[str, Any]) -> str:
    """What the tokens are, with their size."""
    if adapter["peft_type"] in ("PREFIX_TUNING", "CARTRIDGE"):
        return f"keys and values of {adapter['num_layers']} layers, {adapter['token_dim']} wide"
    return f"rows at the embedding, {adapter['token_dim']} wide"


def _origin(sidecar: Sidecar) -> str:
    training = sidecar.training
    if "how" in training:
        return f"{training['how']} by Foreword from {', '.join(f'`{s}`' for s in training['from'])}"
    if sidecar.untrained:
        return f"the model as it is, not trained: {training['rows']} rows chose its wording and its classes' biases"
    return f"trained with Foreword on {training['rows']} rows"


CLASS_COLUMNS = (("accuracy", "accuracy"), ("macro_f1", "macro-F1"), ("loss", "loss"))
TEXT_COLUMNS = (("exact_match", "exact match"), ("bleu", "BLEU"), ("rouge_l", "ROUGE-L"), ("loss", "loss"))
SACREBLEU = {"bleu": "BLEU", "chrf": "chrF"}
"""Scores of 100; the others are of 1."""


def score_columns(scores: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The scores that are shown of classes or of free text: (key, title)."""
    return CLASS_COLUMNS if "accuracy" in scores else TEXT_COLUMNS


def score_rows(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(who, then a cell for each of ``score_columns``) with intervals: the prompt, then its baselines."""
    named = [
        ("soft prompt", scores),
        ("before the first step", scores["baselines"].get("start")),
        ("full text", scores["baselines"].get("full_text")),
        ("zero-shot", scores["baselines"].get("zero_shot")),
        ("majority class", scores["baselines"].get("majority")),
    ]
    keys = [key for key, _ in score_columns(scores)]
    return [(name, *(_with_interval(s, key) for key in keys)) for name, s in named if s is not None]


def rows_scored(scores: Mapping[str, Any]) -> str:
    """How many rows, and how many different inputs where some have several targets."""
    inputs = scores.get("contexts", scores["n"])
    return f"{scores['n']} rows" if inputs == scores["n"] else f"{scores['n']} rows of {inputs} different inputs"


def _with_interval(scores: Mapping[str, Any], key: str) -> str:
    if key not in scores:
        return ""
    low, high = scores["intervals"][key]
    digits = 1 if key in SACREBLEU else 3
    return f"{scores[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _classes(sidecar: Sidecar) -> list[str]:
    task = sidecar.task
    if not task.classifies:
        return []
    rows = [f"| {_cell(c)} | {_cell(_code(w))} |" for c, w in zip(task.classes, task.words, strict=True)]
    if not task.biases:
        return ["| class | label words |", "|---|---|", *rows, ""]
    rows = [f"{row} {bias:+.3f} |" for row, bias in zip(rows, task.biases, strict=True)]
    note = "Foreword adds the bias (nats) to the log-probability of the label words; PEFT by itself does not."
    return ["| class | label words | bias |", "|---|---|---|", *rows, "", note, ""]


def _scores(scores: Mapping[str, Any]) -> list[str]:
    if not scores:
        return ["## Scores", "", "Not scored: no held-out rows were given.", ""]
    titles = [title for _, title in score_columns(scores)]
    table = [f"| {' | '.join(row)} |" for row in score_rows(scores)]
    over = "rows" if "accuracy" in scores else "inputs (of the loss: over rows)"
    return [
        "## Scores", "",
        f"On {rows_scored(scores)}: {scores['protocol']}. In brackets: 95 % intervals over {over}. "
        "Loss is per target token.", "",
        f"| | {' | '.join(titles)} |", f"|{'---|' * (len(titles) + 1)}", *table, "", *_signatures(scores),
    ]  # fmt: skip


def _signatures(scores: Mapping[str, Any]) -> list[str]:
    """What sacrebleu says its scores were made with."""
    found = scores.get("signatures", {})
    lines = [f"- {SACREBLEU[key]} {_with_interval(scores, key)}: sacrebleu `{how}`" for key, how in found.items()]
    return [*lines, ""] if lines else []


def _usage(adapter: Mapping[str, Any], sidecar: Sidecar, base: str) -> list[str]:
    row = json.dumps({f.column: "..." for f in parse(sidecar.task.template).fields}, ensure_ascii=False)
    verb = "predict" if sidecar.task.classifies else "generate"
    ours = f"""\
import foreword
task = foreword.load("<this folder or repository>")
print(task.{verb}([{row}]))"""
    if adapter["peft_type"] == PLACED:
        elsewhere = "PEFT cannot place virtual tokens where these stand."
        return ["## Use", "", *_fenced(ours, "python"), "", elsewhere, ""]
    return [
        "## Use", "", *_fenced(ours, "python"), "",
        "With PEFT (one row at a time: PEFT's batches depend on their padding):", "",
        *_fenced(_with_peft(base), "python"), "",
    ]  # fmt: skip


def _with_peft(base: str) -> str:
    name, imported = json.dumps(base, ensure_ascii=False), ""
    if base == SMOLLM2 or base.endswith(".gguf"):  # names that transformers alone does not know
        name, imported = f"resolve({name})", "from foreword.backbone.source import resolve\n"
    return f"""\
{imported}from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({name})
model = PeftModel.from_pretrained(model, "<this folder or repository>")"""


def _training(sidecar: Sidecar) -> list[str]:
    facts = {**sidecar.training, **{f"{k} version": v for k, v in sidecar.versions.items()}}
    return ["## Training", "", *[f"- {k.replace('_', ' ')}: {v}" for k, v in facts.items() if v is not None]]


def _fenced(text: str, language: str) -> list[str]:
    """A code block, whatever backticks the text itself has."""
    fence = _longer_than_any("`" * 2, text)
    return [f"{fence}{language}", text, fence]


def _code(text: str) -> str:
    """A code span, whatever backticks the text itself has."""
    fence = _longer_than_any("", text)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _longer_than_any(least: str, text: str) -> str:
    runs: list[str] = re.findall("`+", text)
    return max([least, *runs], key=len) + "`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
