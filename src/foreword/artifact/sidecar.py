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
        task = content["task"]
        return Sidecar(
            Task(
                str(task["template"]),
                str(task["separator"]),
                str(task["label_column"]),
                tuple(map(str, task["classes"])),
                tuple(map(str, task["words"])),
                int(task["max_length"]),
            ),
            dict(content["backbone"]),
            dict(content["scores"]),
            dict(content["training"]),
            dict(content["versions"]),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as e:
        raise ForewordError(
            f"damaged sidecar ({type(e).__name__}: {e})", str(file), "delete it to load the bare soft prompt"
        ) from None
