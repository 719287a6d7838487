"""An ensemble: soft prompts of the same classes in one folder, whose probabilities are averaged.

``ensemble.json`` names the members, which are adapter folders below it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreword.artifact.atomic import write_atomic
from foreword.artifact.confined import inside, plain_file, stamps
from foreword.artifact.folder import CONFIG, WEIGHTS, Adapter, read_adapter, weights_bytes
from foreword.artifact.sidecar import SIDECAR, Sidecar, read_sidecar
from foreword.data.template import parse
from foreword.errors import ForewordError

ENSEMBLE = "ensemble.json"
MEMBERS = "members"
FORMAT = 1


def is_ensemble(folder: Path) -> bool:
    """Whether the folder is an ensemble's."""
    return (folder / ENSEMBLE).is_file()


def write_ensemble(folder: Path, members: Sequence[Path]) -> None:
    """Copies adapter folders into a new folder, which appears whole or not at all.

    Raises:
        ForewordError: fewer than two members, one that cannot be read, members of other classes or
            columns, or a folder that is there already.
    """
    if folder.exists():
        raise ForewordError("there is something of this name already", str(folder), "give another --out")
    adapters = [read_adapter(m) for m in members]  # never write what could not be loaded
    check_members([(str(a.folder), a.sidecar) for a in adapters], str(folder))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial-"))
    except OSError as e:
        raise ForewordError(f"cannot write there: {e.strerror}", str(folder), "give another folder") from None
    try:
        _write_members(partial, adapters)
        partial.chmod(0o755)  # mkdtemp's is for its owner alone
        partial.rename(folder)
    except OSError as e:
        raise ForewordError(f"cannot write there: {e.strerror}", str(folder), "give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_ensemble(folder: Path, home: Path | None = None) -> tuple[Path, ...]:
    """The members' folders, each strictly below the ensemble's, without links.

    Args:
        folder: the ensemble's.
        home: where links of files may lead to (the hub's cache is made of links); None: nowhere.

    Raises:
        ForewordError: a damaged ``ensemble.json``, a member outside or missing, fewer than two, one named
            twice, or members of other classes or columns.
    """
    file, root = folder / ENSEMBLE, folder.resolve()
    members = []
    for name in _names(file, home):
        member = inside(root, name)
        if member is None or member in members:
            what = f"the member {name!r} is named twice" if member else f"there is no member {name!r} in the folder"
            raise ForewordError(what, str(file), "write the ensemble again")
        stamps(member, home)
        members.append(member)
    check_members([(m.name, read_sidecar(m)) for m in members], str(file))
    return tuple(members)


def check_members(members: Sequence[tuple[str, Sidecar | None]], where: str) -> None:
    """Refuses members whose probabilities cannot be averaged, each given by its name and sidecar."""
    if len(members) < 2:
        raise ForewordError(f"an ensemble of {len(members)}", where, "give at least two soft prompts")
    facts = []
    for name, sidecar in members:
        if sidecar is None or not sidecar.task.classifies:
            raise ForewordError(f"the member {name} has no classes to average", where, "give classifiers")
        facts.append((sidecar.task.classes, {f.column for f in parse(sidecar.task.template).fields}))
    for (name, _), (classes, columns) in zip(members, facts, strict=True):
        if classes != facts[0][0]:
            raise ForewordError(f"the member {name} has other classes than the first", where, "give one task's")
        if columns != facts[0][1]:
            raise ForewordError(f"the member {name} reads other columns than the first", where, "give one task's")


def member_name(number: int) -> str:
    """Where a member's folder lies below the ensemble's."""
    return f"{MEMBERS}/{number:02}"


def write_index(folder: Path, count: int) -> None:
    """Makes a folder with so many members an ensemble's."""
    content = {"format": FORMAT, "members": [member_name(i) for i in range(count)]}
    write_atomic(folder / ENSEMBLE, json.dumps(content, indent=2).encode())


def _write_members(folder: Path, adapters: Sequence[Adapter]) -> None:
    for number, adapter in enumerate(adapters):
        own = folder / member_name(number)
        own.mkdir(parents=True)
        for file in (CONFIG, WEIGHTS, SIDECAR):
            if (adapter.folder / file).is_file():
                write_atomic(own / file, (adapter.folder / file).read_bytes())
        if not (own / WEIGHTS).exists():  # they lie in the older pickle format
            write_atomic(own / WEIGHTS, weights_bytes(adapter.tensors))
    write_index(folder, len(adapters))


def _names(file: Path, home: Path | None) -> list[str]:
    plain_file(file, home)
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ForewordError(f"damaged ensemble ({type(e).__name__})", str(file), "write it again") from None
    names = content.get("members") if isinstance(content, Mapping) else None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or content.get("format") != FORMAT:
        raise ForewordError(f"no ensemble of format {FORMAT}", str(file), "write it again, or upgrade foreword")
    return names
