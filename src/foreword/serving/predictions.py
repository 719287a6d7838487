"""Classes of many rows on a backbone in this process, so many rows at a time.

Rows of a unit are packed together, soft prompt by soft prompt, and with no others: so what a row gets does not
hang on when it came, and a run that was stopped ends in the same bytes. (In an engine, the rows that happen to
wait are packed together, and the last digits differ with the company.)
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from foreword.artifact.folder import weights_bytes
from foreword.backbone.choose import Layout, choose_layout
from foreword.errors import ForewordError
from foreword.evaluation.scoring import Floats, classify, rebalanced
from foreword.jobs.load import MEMORY_KNOB, Foreword, Prediction
from foreword.jobs.prepare import memory_explained
from foreword.records import Segment
from foreword.serving.batch import NamedRows, group_by_name, mean_prediction

UNIT = 256
"""Rows that are computed together."""
KEPT_BYTES = 1 << 28
"""Of soft prompts kept in memory; the longest unused goes first and is read again when it is named."""
Members = tuple[Foreword, ...]
"""One soft prompt, or those of an ensemble."""


def revision(members: Members) -> str:
    """The SHA-256 over values and tasks, in 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for member in members:
        digest.update(weights_bytes(member.adapter.tensors))
        digest.update(json.dumps(asdict(member.task)).encode())
    return digest.hexdigest()[:12]


class Predictor:
    """Classifies rows.

    Args:
        rows: the rows.
        open_: the soft prompts of a name, all on one backbone.
    """

    def __init__(self, rows: NamedRows, open_: Callable[[str], Members]) -> None:
        self.rows, self._read = rows, open_
        self._kept: OrderedDict[str, Members] = OrderedDict()
        self._layouts: dict[str, Layout] = {}

    def check(self) -> dict[str, str]:
        """Opens every soft prompt and reads every row once; returns the revision of each name.

        Raises:
            ForewordError: a soft prompt without classes, or a row that cannot be read, by its number.
        """
        revisions = {}
        for name, indices in self.rows.by_name.items():
            members = self._open(name)
            revisions[name] = revision(members)
            for member in members:
                if not member.task.classifies:
                    raise ForewordError(
                        f"the soft prompt '{name}' writes text and has no classes", self.rows.place, "use generate"
                    )
                for at in range(0, len(indices), UNIT):  # to be looked at and forgotten: files are long
                    member.encoder.contexts(self.rows.table.pick(indices[at : at + UNIT]))
        return revisions

    def units(self, start: int, progress: Callable[[int], None]) -> Iterator[list[Prediction]]:
        """Predictions of the rows from ``start`` (a multiple of ``UNIT``) on, unit by unit, in order."""
        count = len(self.rows.table)
        for at in range(start, count, UNIT):
            with memory_explained(MEMORY_KNOB):
                yield self._unit(range(at, min(at + UNIT, count)), progress)

    def _open(self, name: str) -> Members:
        if name not in self._kept:
            self._kept[name] = self._read(name)
            while len(self._kept) > 1 and sum(map(_nbytes, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        return self._kept[name]

    def _unit(self, indices: range, progress: Callable[[int], None]) -> list[Prediction]:
        found: dict[int, Prediction] = {}
        for name, own in group_by_name(self.rows.names, indices).items():
            members = self._open(name)
            tables = [self._probabilities(m, own, progress if m is members[-1] else _silent) for m in members]
            classes = members[0].task.classes
            found.update({i: mean_prediction(classes, [t[k] for t in tables]) for k, i in enumerate(own)})
        return [found[i] for i in indices]

    def _probabilities(self, member: Foreword, indices: Sequence[int], progress: Callable[[int], None]) -> Floats:
        """Of the classes ``[n, C]``."""
        contexts = member.encoder.contexts(self.rows.table.pick(indices))
        layout = self._layout(member, contexts)
        table = classify(member.backbone, member.prompt, contexts, member.encoder.label_ids, layout, progress)
        return rebalanced(table, member.task.biases)

    def _layout(self, member: Foreword, contexts: Sequence[tuple[int, ...]]) -> Layout:
        """Proved on the first rows of each kind of soft prompt."""
        kind = member.prompt.kind
        if kind not in self._layouts:
            segments = [Segment(c, member.encoder.label_ids) for c in contexts]
            self._layouts[kind] = choose_layout(member.backbone, member.prompt, segments, gradient=False).score
        return self._layouts[kind]


def _nbytes(members: Members) -> int:
    return sum(m.prompt.values.nbytes for m in members)


def _silent(rows: int) -> None:
    """Progress of members before the last: a row counts once."""
