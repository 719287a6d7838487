"""An ensemble in use: soft prompts of the same classes on one backbone, whose probabilities are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from foreword.artifact.ensemble import is_ensemble
from foreword.artifact.hub import locate, members_of, push
from foreword.artifact.sidecar import Sidecar, read_sidecar
from foreword.backbone.load import Backbone
from foreword.errors import ForewordError
from foreword.evaluation.scoring import silent
from foreword.evaluation.together import averaged
from foreword.jobs.data import Source, read_labelled
from foreword.jobs.load import Foreword, Prediction, beside_baselines, load, open_run, predictions, together
from foreword.jobs.match import check_backbone, refuse_several_tasks
from foreword.records import Row, Task


class Ensemble:
    """Several soft prompts with their one backbone, ready to use. Made by ``foreword.load``."""

    def __init__(self, members: Sequence[Foreword], folder: Path, sidecar: Sidecar | None) -> None:
        self.members, self.folder, self.sidecar = tuple(members), folder, sidecar
        self.backbone = members[0].backbone

    @property
    def task(self) -> Task:
        """Classes and columns, which all members share; the template is the first one's."""
        return self.members[0].task

    @property
    def scores(self) -> Mapping[str, Any]:
        """The scores stored with the ensemble; empty when it was not scored."""
        return self.sidecar.scores if self.sidecar else {}

    def predict(self, rows: Sequence[Row | str], progress: Any = silent) -> list[Prediction]:
        """Label and probabilities of each row, in order; as ``Foreword.predict``.

        ``progress`` is told the number of rows when they are done.
        """
        if not rows:
            return []
        tables = [table for group in self._alike() for table in together(group, rows)]
        progress(len(rows))
        return predictions(self.task.classes, np.mean(tables, axis=0))

    def _alike(self) -> list[list[Foreword]]:
        """Members that can share passes: of one kind, size and wording."""
        groups: dict[Any, list[Foreword]] = {}
        for member in self.members:
            wording = replace(member.task, biases=())
            groups.setdefault((member.prompt.kind, member.prompt.tokens, wording), []).append(member)
        return list(groups.values())

    def generate(self, rows: Sequence[Row | str], sampling: Any = None) -> list[str]:
        """Refused: texts have no mean."""
        raise ForewordError(
            "an ensemble classifies and writes no text", str(self.folder), f"load a member: {self.folder}/members/00"
        )

    def evaluate(
        self, data: Source, split: str = "test", incomplete: bool = False, progress: Any = silent
    ) -> dict[str, Any]:
        """Scores on labelled rows beside the baselines; arguments as ``Foreword.evaluate``."""
        table = read_labelled(data, split, self.task, incomplete)
        outcome = averaged([m.outcome(table, progress) for m in self.members])
        return beside_baselines(self.members[0], outcome, table, progress)

    def push(self, repo: str, private: bool = False) -> str:
        """Uploads the folder with all members to the hub; returns the commit's address."""
        return push(self.folder, repo, private)


def load_any(path_or_id: str | Path, **options: Any) -> Foreword | Ensemble:
    """A soft prompt or an ensemble, from a folder or the hub; options as ``load``."""
    folder = locate(str(path_or_id), options.get("revision"))
    if not is_ensemble(folder):
        return load(path_or_id, **options)
    first = load(str(members_of(folder)[0]), **{k: v for k, v in options.items() if k != "revision"})
    return _opened(folder, first.backbone, bool(options.get("force")))


def open_any(folder: Path, backbone: Backbone) -> Foreword | Ensemble:
    """A finished run or ensemble with the backbone it was just trained on."""
    return _opened(folder, backbone, force=False) if is_ensemble(folder) else open_run(folder, backbone)


def _opened(folder: Path, backbone: Backbone, force: bool) -> Ensemble:
    return Ensemble(open_members(folder, backbone, force), folder, read_sidecar(folder))


def open_members(folder: Path, backbone: Backbone, force: bool = False) -> tuple[Foreword, ...]:
    """The soft prompts of a run, adapter or ensemble folder on a backbone.

    Raises:
        ForewordError: no adapter there, a damaged one, or one for another backbone (unless ``force``).
    """
    members = tuple(open_run(f, backbone) for f in (members_of(folder) if is_ensemble(folder) else (folder,)))
    for member in members:
        refuse_several_tasks(member.adapter)
        check_backbone(member.adapter, backbone, force)
    return members
