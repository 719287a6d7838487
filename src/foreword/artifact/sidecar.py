"""``foreword.json``: what PEFT's configuration has no field for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foreword.errors import ForewordError
from foreword.records import Task

SIDECAR = "foreword.json"
FORMAT = 1
MOST_BIAS = 100.0
"""Nats; beyond there are only damaged ones."""


@dataclass(frozen=True)
class Sidecar:
    """The sidecar's content.

    ``backbone``: name, revision and fingerprint. ``scores``: as ``foreword evaluate --json``.
    ``training``: seeds, data hash, steps, initialiser. ``versions``: of the libraries.
    """

    task: Task
    backbone: Mapping[str, Any]
    scores: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        """Whether it is the model as it is, of which nothing was trained."""
        return self.training.get("epochs") == 0

    def to_json(self) -> str:
        """Sorted, indented JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_sidecar(folder: Path) -> Sidecar | None:
    """The sidecar of an adapter folder; None for adapters made elsewhere."""
    file = folder / SIDECAR
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ForewordError(
                f"sidecar format {content['format']}, this Foreword reads {FORMAT}", str(file), "upgrade foreword"
            )
        return Sidecar(
            _task(content["task"]),
            dict(content["backbone"]),
            dict(content["scores"]),
            dict(content["training"]),
            dict(content["versions"]),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as e:  # bad JSON or UTF-8 is a ValueError
        raise ForewordError(
            f"damaged sidecar ({type(e).__name__}: {e})", str(file), "delete it to load the bare soft prompt"
        ) from None


def _task(stored: Mapping[str, Any]) -> Task:
    classes, words = tuple(map(str, stored["classes"])), tuple(map(str, stored["words"]))
    if len(classes) != len(words):
        raise ValueError(f"{len(classes)} classes, {len(words)} label words")
    biases = tuple(map(float, stored.get("biases", ())))
    if biases and (len(biases) != len(classes) or not all(abs(b) <= MOST_BIAS for b in biases)):
        raise ValueError(f"{len(classes)} classes, biases {list(biases)}")
    return Task(
        str(stored["template"]),
        str(stored["separator"]),
        str(stored["label_column"]),
        classes,
        words,
        int(stored["max_length"]),
        tuple(map(str, stored["names"])),
        str(stored.get("placement", "front")),
        biases,
    )
