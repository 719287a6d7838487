"""Several soft prompts of one backbone made into one, scored before and after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from foreword.artifact.folder import Adapter, read_adapter
from foreword.artifact.hub import locate
from foreword.artifact.lock import run_folder
from foreword.errors import ForewordError
from foreword.evaluation.scoring import silent
from foreword.jobs.data import Source
from foreword.jobs.derive import Scored, derived, lineage, load_source, write_derived
from foreword.jobs.load import Foreword, open_run
from foreword.jobs.match import check_backbone
from foreword.prompts.combine import HALF, combine
from foreword.records import Task

log = logging.getLogger("foreword")

SAID = {"average": "averaged", "concatenate": "concatenated", "interpolate": "interpolated"}


def combine_runs(
    sources: Sequence[str],
    how: str,
    out: Path,
    weight: float | None = None,
    data: Source | None = None,
    split: str = "test",
    model: str | None = None,
    device: str = "auto",
    progress: Any = silent,
) -> list[Scored]:
    """Makes one soft prompt of several and writes its folder; template and label words are the first source's.

    Args:
        sources: run or adapter folders, bare files or hub ids.
        how: average, concatenate or interpolate.
        out: the folder; new or empty.
        weight: of the second source, for interpolate.
        data: labelled rows to score on; they choose nothing.
        split: of a hub data set.
        model: backbone, where the first source's own name for it does not lead to it.
        device: auto, cuda, cuda:N, mps or cpu.
        progress: told the number of rows done since the last call.

    Returns:
        With ``data`` the scores of each source and at last of the result, all with the same task.

    Raises:
        ForewordError: sources that do not go together, or another backbone than the first's.
    """
    with run_folder(out, resume=False):
        adapters = [read_adapter(locate(s)) for s in sources]
        prompt = combine(how, [a.prompt for a in adapters], weight, sources)  # refused before a model is loaded
        first = load_source(sources[0], model, device)
        task = _common_task(first, adapters, sources, how)
        facts = {"how": SAID[how], "from": list(sources), **lineage(adapters)}
        if how == "interpolate":
            facts["weight"] = HALF if weight is None else weight
        scored = []
        if data is not None:
            ready = [Foreword(a, first.backbone, task) for a in adapters]
            ready.append(derived(prompt, first.backbone, task, facts, out))
            scored = _scored([*sources, "the result"], ready, data, split, progress)
        write_derived(out, prompt, first.backbone, task, facts, scored[-1].scores if scored else {})
    return scored


def _common_task(first: Foreword, adapters: Sequence[Adapter], names: Sequence[str], how: str) -> Task:
    """The first source's task, if the virtual tokens of all stand where the result's will."""
    others = [_beside(first, a) for a in adapters[1:]]
    places = [_place(source) for source in (first, *others)]
    where = ", ".join(f"{name}: {place}" for name, place in zip(names, places, strict=True))
    if how == "concatenate" and set(places) != {"front"}:
        raise ForewordError(
            "only virtual tokens in front of all text can follow one another",
            where,
            "train with prompt.placement=front",
        )
    if len(set(places)) > 1:
        raise ForewordError(
            "the virtual tokens stand at different places", where, "give soft prompts of one placement and template"
        )
    for name, other in zip(names[1:], others, strict=True):
        if other.adapter.sidecar and _wording(other.task) != _wording(first.task):
            log.info("%s has another template or other label words; those of %s are kept", name, names[0])
    task = _unplaced(first) if how == "concatenate" else first.task
    return replace(task, biases=())  # they are of the first one's values


def _beside(first: Foreword, adapter: Adapter) -> Foreword:
    """Another source on the first one's backbone; refuses what was trained for another."""
    try:
        check_backbone(adapter, first.backbone)
    except ForewordError as e:
        raise ForewordError(e.what, e.where, "give soft prompts of one backbone, or transfer one") from None
    return open_run(adapter.folder, first.backbone)


def _place(source: Foreword) -> str:
    """Where its virtual tokens stand: front, or the placement or template that says so."""
    if source.encoder.at_front:
        return "front"
    return source.task.template if source.encoder.template.soft_tokens else source.task.placement


def _wording(task: Task) -> tuple[object, ...]:
    return task.template, task.separator, task.classes, task.words


def _unplaced(source: Foreword) -> Task:
    """Its task without the ``{soft:N}`` that opens the template: in front there is room for any number."""
    task = source.task
    if not source.encoder.template.soft_tokens:
        return task
    return replace(task, template=task.template[task.template.index("}") + 1 :], placement="front")


def _scored(names: Sequence[str], ready: Sequence[Foreword], data: Source, split: str, progress: Any) -> list[Scored]:
    """Everybody's scores on the same rows; the result's say so if a source was trained on these."""
    found = [made.evaluate(data, split, progress=progress) for made in ready]
    protocol = max((scores["protocol"] for scores in found), key=len)  # they differ in that note alone
    found[-1]["protocol"] = protocol
    return [Scored(name, scores) for name, scores in zip(names, found, strict=True)]
