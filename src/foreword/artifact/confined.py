"""Folders in reach of strangers: no path leads outside, no file is a link, nothing but safetensors is read."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from foreword.artifact.folder import CONFIG, LEGACY_WEIGHTS, WEIGHTS, Adapter, read_adapter
from foreword.artifact.sidecar import SIDECAR
from foreword.errors import ForewordError

Stamps = Mapping[str, tuple[int, int, int]]
"""Inode, size and time of change of an adapter folder's files."""
TEXT_LIMIT = 1 << 24
"""Most bytes of a configuration or sidecar (the largest in use, of CPT with long examples, take some hundred kB)."""
PAUSES = (0.0, 0.02, 0.1)
"""Seconds before each reading of a folder that is being written to."""
_CHUNK = 1 << 20


def inside(root: Path, relative: str) -> Path | None:
    """The folder at a path below ``root`` (itself free of links).

    None where there is none, and where the path is absolute, holds ``..``, a backslash, hidden or unprintable
    names, or passes through a link.
    """
    parts = relative.split("/")
    if any(p == "" or p.startswith(".") or "\\" in p or not p.isprintable() for p in parts):
        return None
    path = root.joinpath(*parts)
    with suppress(OSError, ValueError):  # no such path, a name too long for the system or not to be encoded
        if os.path.realpath(path, strict=True) == str(path) and path.is_dir():
            return path
    return None


def stamps(folder: Path, home: Path | None = None) -> Stamps:
    """What the files of an adapter folder are now.

    Args:
        folder: the adapter folder.
        home: where links may lead to (the hub's cache is made of links); None: no file may be one.

    Raises:
        ForewordError: a file that is missing, leads elsewhere, or is not a plain one; an oversized text.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for name in (CONFIG, WEIGHTS, SIDECAR):
        status = plain_file(folder / name, home)
        if status is None and name != SIDECAR:
            legacy = name == WEIGHTS and (folder / LEGACY_WEIGHTS).exists()
            fix = "convert it: foreword export" if legacy else "give a finished run or adapter folder"
            what = f"there is no {name}" + (", and pickles are not served" if legacy else "")
            raise ForewordError(what, str(folder), fix)
        if status is not None and name != WEIGHTS and status.st_size > TEXT_LIMIT:
            raise ForewordError(f"{name} has {status.st_size} bytes", str(folder), f"{TEXT_LIMIT} bytes are read")
        if status is not None:
            found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def read_confined(folder: Path, home: Path | None = None) -> tuple[Adapter, str, Stamps]:
    """Reads an adapter folder whose files are plain ones; arguments as ``stamps``.

    Returns:
        the adapter, the SHA-256 of its files in hexadecimal, and their stamps.

    Raises:
        ForewordError: as ``read_adapter`` and ``stamps``, or the files were exchanged at every reading.
    """
    for pause in PAUSES:
        time.sleep(pause)
        before = stamps(folder, home)
        try:
            found = _read(folder, before, follow=home is not None)
        except ForewordError:
            if stamps(folder, home) == before:
                raise
            continue
        if stamps(folder, home) == before:
            return *found, before
    raise ForewordError("the folder was written to while it was read", str(folder), "load it again")


def _read(folder: Path, before: Stamps, follow: bool) -> tuple[Adapter, str]:
    """The adapter and its digest."""
    digest = hashlib.sha256()
    for name in before:
        digest.update(f"{name} {before[name][1]}\n".encode())
        _hash_file(folder / name, digest, follow)
    return read_adapter(folder), digest.hexdigest()


def plain_file(file: Path, home: Path | None = None) -> os.stat_result | None:
    """The status of a file that is no link (``home``: as in ``stamps``) and no pipe; None where there is none."""
    try:
        status = file.lstat()
        if home is not None and stat.S_ISLNK(status.st_mode):
            real = Path(os.path.realpath(file, strict=True))
            status = real.lstat() if real.is_relative_to(home) else status
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise ForewordError(f"{file.name} is a link or no plain file", str(file.parent), "put the file itself there")
    return status


def _hash_file(file: Path, digest: hashlib._Hash, follow: bool) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
        with open(descriptor, "rb") as f:  # noqa: PTH123 - of a descriptor
            while chunk := f.read(_CHUNK):
                digest.update(chunk)
    except OSError as e:
        raise ForewordError(f"cannot read the file: {e.strerror}", str(file), "check its rights") from None
