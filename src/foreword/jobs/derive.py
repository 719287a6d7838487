"""Soft prompts made from soft prompts: written as runs are, with what they were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword.artifact.atomic import write_atomic
from foreword.artifact.folder import Adapter, read_adapter, write_adapter
from foreword.artifact.lock import run_folder
from foreword.artifact.peft_types import TENSOR, peft_config, placed_config
from foreword.artifact.sidecar import Sidecar
from foreword.backbone.attach import compiled
from foreword.backbone.choose import LOW_PRECISION, TOLERANCE
from foreword.backbone.load import Backbone
from foreword.config import PromptConfig
from foreword.data.sources import file_name
from foreword.errors import ForewordError
from foreword.evaluation.scoring import score_branches
from foreword.jobs.load import Foreword, load
from foreword.jobs.prepare import make_encoder
from foreword.prompts.soft import SoftPrompt
from foreword.records import Task
from foreword.report.card import model_card
from foreword.versions import library_versions

PROOF_TOKENS = 48
TRAINED_ON = ("data_sha256", "label_counts")
FORCE = ", or --force to use it all the same"
KIND_TYPES = {"rows": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}


@dataclass(frozen=True)
class Scored:
    """Somebody's scores, as ``Foreword.evaluate`` gives them."""

    name: str
    scores: Mapping[str, Any]


def compile_run(source: str, out: Path, model: str | None = None, device: str = "auto") -> Foreword:
    """Runs a soft prompt through its backbone once and writes the keys and values it leaves.

    The result is a PREFIX_TUNING folder: the same soft prompt at no cost for its tokens, and stock
    PEFT's ``generate`` does not depend on padding with it.

    Raises:
        ForewordError: it is a prefix already, does not stand at the front, or the backbone's layers
            share or differ in their keys and values.
    """
    with run_folder(out, resume=False):
        return _compiled(source, out, load_source(source, model, device))


def _compiled(source: str, out: Path, made: Foreword) -> Foreword:
    if made.prompt.kind == "prefix":
        raise ForewordError("this soft prompt is keys and values already", source, "use it as it is")
    if not made.encoder.at_front:
        raise ForewordError(
            "only virtual tokens in front of all text have keys and values that do not depend on it",
            f"{source}, placement {made.task.placement}, template {made.task.template!r}",
            "train with prompt.placement=front",
        )
    prompt = SoftPrompt(compiled(made.backbone, made.prompt.values), "prefix")
    _prove(made.backbone, made.prompt, prompt)
    facts = {"how": "compiled", "from": [source], **lineage([made.adapter])}
    scores = dict(made.scores)
    if scores:
        scores["protocol"] = f"{scores['protocol']}, measured before compiling"
    write_derived(out, prompt, made.backbone, made.task, facts, scores)
    return Foreword(read_adapter(out), made.backbone, made.task)


def load_source(source: str, model: str | None, device: str, option: str = "--model") -> Foreword:
    """What a soft prompt is made from; an error tells of the options that its verb has.

    Args:
        source: run or adapter folder, bare file or hub id.
        model: backbone, where the source's own name for it does not lead to it.
        device: as in ``load``.
        option: the one that gives ``model``.
    """
    try:
        return load(source, model=model, device=device)
    except ForewordError as e:
        raise ForewordError(e.what, e.where, e.fix.removesuffix(FORCE).replace("--model", option)) from None


def lineage(sources: Sequence[Adapter]) -> dict[str, Any]:
    """What all sources say alike of their training rows, so that scores on those rows still tell so."""
    stated = [a.sidecar.training if a.sidecar else {} for a in sources]
    return {k: stated[0][k] for k in TRAINED_ON if all(k in s and s[k] == stated[0][k] for s in stated)}


def derived(prompt: SoftPrompt, backbone: Backbone, task: Task, facts: Mapping[str, Any], out: Path) -> Foreword:
    """A soft prompt in use before its folder is written, so that it can be scored; arguments as ``write_derived``."""
    return Foreword(Adapter(prompt, {}, {}, Sidecar(task, {}, training=facts), out), backbone, task)


def _prove(backbone: Backbone, rows: SoftPrompt, prefix: SoftPrompt) -> None:
    """Refuses a compiled soft prompt that does not say what its rows say of a text."""
    text = tuple(range(1, min(PROOF_TOKENS, backbone.vocab_size, backbone.window - rows.tokens)))
    first = backbone.vocab_size
    branches = [[(1,)]] * len(text)
    texts = [text[: i + 1] for i in range(len(text))]
    expected = score_branches(
        backbone, rows, [(*range(first, first + rows.tokens), *t) for t in texts], branches, "rows"
    )
    found = score_branches(backbone, prefix, texts, branches, "rows")
    difference = float(abs(found.full - expected.full).max())
    if difference > TOLERANCE.get(backbone.dtype, LOW_PRECISION).alone:
        raise ForewordError(
            f"its keys and values alone are another soft prompt here: log-probabilities differ by {difference:.1g}",
            f"{backbone.name} ({backbone.config.model_type})",
            "use the soft prompt as it is",
        )


def write_derived(
    out: Path,
    prompt: SoftPrompt,
    backbone: Backbone,
    task: Task,
    facts: Mapping[str, Any],
    scores: Mapping[str, Any],
    peft_type: str = "",
    config: PromptConfig | None = None,
) -> None:
    """An adapter folder of a soft prompt that no training of its own made.

    Args:
        out: the folder, locked by the caller.
        prompt: the soft prompt.
        backbone: what it is for.
        task: what it does.
        facts: how it was made, for sidecar and card (JSON-safe; ``how`` and ``from`` at least).
        scores: of it, or none.
        peft_type: PEFT's type; empty: prompt or prefix tuning, by its kind.
        config: settings of the soft prompt that the type states.
    """
    tensors = {TENSOR: prompt.values}
    adapter = peft_config(
        peft_type or KIND_TYPES[prompt.kind], tensors, model_config=backbone.config, base=backbone.name,
        revision=backbone.revision, prompt=config or PromptConfig(virtual_tokens=prompt.tokens),
        geometry=backbone.geometry if prompt.kind == "prefix" else None,
    )  # fmt: skip
    if not make_encoder(task, backbone, prompt.tokens, prompt.kind).at_front:
        adapter = placed_config(adapter)
    named = {**facts, "from": [file_name(source) for source in facts["from"]]}  # shared later: without local folders
    sidecar = Sidecar(task, backbone_facts(backbone), dict(scores), named, library_versions())
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "README.md", model_card(adapter, sidecar).encode())
    write_adapter(out, tensors, adapter, sidecar)


def backbone_facts(backbone: Backbone) -> dict[str, Any]:
    """What a sidecar says of the backbone."""
    return {
        "name": backbone.name,
        "revision": backbone.revision,
        "commit": getattr(backbone.model.config, "_commit_hash", None),
        "fingerprint": backbone.fingerprint.as_dict(),
    }
