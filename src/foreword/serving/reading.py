"""From a folder to what an engine takes in, checked against what the engine runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreword.artifact.confined import read_confined, stamps
from foreword.artifact.ensemble import is_ensemble, read_ensemble
from foreword.artifact.folder import CONFIG, WEIGHTS, Adapter
from foreword.artifact.peft_types import PLACED
from foreword.backbone.fingerprint import Fingerprint
from foreword.errors import ForewordError
from foreword.jobs.match import refuse_several_tasks, rounding_note
from foreword.prompts.soft import Kind
from foreword.records import Task
from foreword.serving.engine import Capabilities

log = logging.getLogger("foreword")
REVISION_DIGITS = 12
HEADERS = 1 << 16
"""More than the header of a safetensors file takes."""
OTHER_MODEL = "serve it with the model it was trained for"


@dataclass(frozen=True)
class Part:
    """One soft prompt: values ``[P, W]`` in float32, and what it does (None: it brings no sidecar)."""

    values: NDArray[np.float32]
    kind: Kind
    task: Task | None


@dataclass(frozen=True)
class Content:
    """A soft prompt or an ensemble as it lies on disk. ``created``: seconds since 1970."""

    revision: str
    parts: tuple[Part, ...]
    created: int

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return sum(p.values.nbytes for p in self.parts)


def read_content(folder: Path, home: Path | None, known: Capabilities, most: int) -> Content:
    """Reads an adapter or ensemble folder; blocks.

    Args:
        folder: the folder.
        home: where links may lead to; None: nowhere.
        known: of the engine it is for.
        most: bytes it may have.

    Raises:
        ForewordError: damaged, not finite, a pickle, leading elsewhere, too large, or for another model.
    """
    folders = read_ensemble(folder, home) if is_ensemble(folder) else (folder,)
    on_disk = sum(stamps(f, home)[WEIGHTS][1] for f in folders)
    _refuse_large(on_disk // 2 - HEADERS, most, folder)  # before it is read: float64 has twice the bytes
    parts, created, digests = [], 0, []
    for member in folders:
        adapter, digest, stamped = read_confined(member, home)
        check_fits(adapter, known)
        if known.quantize and (note := rounding_note(adapter, known.quantize)):
            log.warning("%s", note)
        values = np.ascontiguousarray(adapter.prompt.values.numpy(), dtype=np.float32)
        parts.append(Part(values, adapter.prompt.kind, adapter.sidecar.task if adapter.sidecar else None))
        created = max(created, stamped[CONFIG][2] // 10**9)
        digests.append(digest)
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    content = Content(digest[:REVISION_DIGITS], tuple(parts), created)
    _refuse_large(content.nbytes, most, folder)
    return content


def check_fits(adapter: Adapter, known: Capabilities) -> None:
    """Refuses a soft prompt that this engine cannot run or that was trained for another model."""
    refuse_several_tasks(adapter)
    prompt, where = adapter.prompt, str(adapter.folder)
    if prompt.kind not in known.kinds:
        what = "rows of virtual tokens" if prompt.kind == "rows" else "keys and values (a prefix)"
        raise ForewordError(f"the engine {known.engine} takes no {what}", where, "serve it with another --engine")
    width = known.hidden_size if prompt.kind == "rows" else known.prefix_width
    if prompt.values.shape[1] != width:
        raise ForewordError(
            f"the soft prompt is {prompt.values.shape[1]} wide, the model {known.model} {width}", where, OTHER_MODEL
        )
    if known.window - prompt.tokens < 2:
        raise ForewordError(
            f"its {prompt.tokens} virtual tokens leave no room in the model's window of {known.window}",
            where,
            "serve it with a longer window",
        )
    if adapter.sidecar is None and adapter.config.get("peft_type") == PLACED:
        raise ForewordError(
            "its virtual tokens do not stand in front, and without its sidecar nothing says where",
            where,
            "put its foreword.json there",
        )
    if difference := _difference(adapter, known.fingerprint):
        raise ForewordError(
            f"another model than {known.model} is what it was trained for: {difference}", where, OTHER_MODEL
        )


def _difference(adapter: Adapter, own: Mapping[str, Any]) -> str:
    """How the model it was trained for differs from the engine's, as far as both are known; mostly empty."""
    if not own:
        return ""
    trained = adapter.sidecar.backbone.get("fingerprint") if adapter.sidecar else None
    if trained is None:
        stated, layers = adapter.config.get("num_layers"), own["num_layers"]
        return f"num_layers is {layers}, not {stated}" if stated and stated != layers else ""
    try:
        fingerprint = Fingerprint.from_dict(trained)
    except (KeyError, TypeError, ValueError) as e:
        raise ForewordError(
            f"damaged sidecar ({type(e).__name__} in its fingerprint)", str(adapter.folder), "train it again"
        ) from None
    return fingerprint.differs(Fingerprint.from_dict(own))


def _refuse_large(nbytes: int, most: int, folder: Path) -> None:
    if nbytes > most:
        raise ForewordError(
            f"the soft prompt has {nbytes} bytes, all together may have {most}", str(folder), "give the server more"
        )
