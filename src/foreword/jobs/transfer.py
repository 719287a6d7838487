"""A soft prompt of one backbone made into one of another, scored on both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foreword.artifact.folder import read_adapter
from foreword.artifact.hub import locate
from foreword.artifact.lock import run_folder
from foreword.backbone.load import load_backbone, load_tokenizer
from foreword.config import ModelConfig
from foreword.evaluation.scoring import silent
from foreword.jobs.data import Source
from foreword.jobs.derive import Scored, derived, lineage, load_source, write_derived
from foreword.jobs.prepare import embedded
from foreword.prompts.soft import SoftPrompt
from foreword.prompts.transfer import Map, carried, fit, refuse_prefix, shared_ids
from foreword.records import Task

FROM = "--from-model"


@dataclass(frozen=True)
class Transferred:
    """The map that a soft prompt was carried by, and the scores before and after (none without rows)."""

    found: Map
    scored: list[Scored]


@dataclass(frozen=True)
class _Before:
    """What is kept of the source when its backbone goes: two models never lie in memory together.

    ``embeddings`` ``[n, H1]`` of shared tokens; ``target_ids`` ``[n]``: the same tokens in the target.
    """

    prompt: SoftPrompt
    task: Task
    embeddings: torch.Tensor
    target_ids: list[int]
    facts: dict[str, Any]
    scored: list[Scored]


def transfer_run(
    source: str,
    model: str,
    out: Path,
    data: Source | None = None,
    split: str = "test",
    device: str = "auto",
    from_model: str | None = None,
    progress: Any = silent,
) -> Transferred:
    """Carries a soft prompt's rows to another backbone and writes them as a soft prompt of that one.

    Args:
        source: run or adapter folder, bare file or hub id.
        model: the target: hub id, folder or .gguf.
        out: the folder; new or empty.
        data: labelled rows to score on; they choose nothing.
        split: of a hub data set.
        device: auto, cuda, cuda:N, mps or cpu.
        from_model: the source's backbone, where its own name for it does not lead to it.
        progress: told the number of rows done since the last call.

    Raises:
        ForewordError: a prefix, or vocabularies that share too few tokens.
    """
    with run_folder(out, resume=False):
        refuse_prefix(read_adapter(locate(source)).prompt, source)
        before = _before(source, model, data, split, device, from_model, progress)
        target = load_backbone(ModelConfig(model, device=device))
        found = fit(before.embeddings, embedded(target, before.target_ids))
        prompt = carried(before.prompt, found)
        facts = {**before.facts, "shared_tokens": found.tokens + found.held_out, "r2": round(found.r2, 4)}
        scored = list(before.scored)
        if data is not None:
            made = derived(prompt, target, before.task, facts, out)
            scored.append(Scored(f"transferred to {model}", made.evaluate(data, split, progress=progress)))
        write_derived(out, prompt, target, before.task, facts, scored[-1].scores if scored else {})
    return Transferred(found, scored)


def _before(
    source: str, model: str, data: Source | None, split: str, device: str, from_model: str | None, progress: Any
) -> _Before:
    """Reads the source with its backbone, scores it there, and lets the backbone go."""
    tokenizer, config = load_tokenizer(ModelConfig(model))
    made = load_source(source, from_model, device, FROM)
    own = made.backbone
    pairs = shared_ids(
        _vocabulary(own.tokenizer, own.vocab_size),
        _vocabulary(tokenizer, int(config.vocab_size)),
        own.hidden_size,
        f"{own.name} and {model}",
    )
    facts = {"how": "transferred", "from": [source], "from_model": own.name, **lineage([made.adapter])}
    scored = []
    if data is not None:
        scored = [Scored(f"{source} on {own.name}", made.evaluate(data, split, progress=progress))]
    embeddings = embedded(own, [mine for mine, _ in pairs])
    task = replace(made.task, biases=())  # they are of that backbone
    return _Before(made.adapter.prompt, task, embeddings, [theirs for _, theirs in pairs], facts, scored)


def _vocabulary(tokenizer: Any, rows: int) -> dict[str, int]:
    """Tokens with an embedding and their ids, without the special ones."""
    special = set(tokenizer.all_special_ids)
    return {token: i for token, i in tokenizer.get_vocab().items() if i < rows and i not in special}
