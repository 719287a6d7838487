"""One run folder, one writer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from foreword.errors import ForewordError

LOCK = ".lock"


@contextmanager
def run_folder(folder: Path, resume: bool) -> Iterator[Path]:
    """Holds the folder for this process; a fresh run needs an empty or new one.

    Raises:
        ForewordError: in use by another run, not empty, not a folder, or not writable.
    """
    if folder.exists() and not folder.is_dir():
        raise ForewordError("the output is a file, not a folder", str(folder), "give another --out")
    if not resume and folder.is_dir() and not (folder / LOCK).exists():
        _refuse_full(folder)  # before the lock file is made: no trace in a folder that is not ours
    try:
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ForewordError("another run is writing here", str(folder), "wait for it, or give another --out") from None
    except OSError as e:
        raise ForewordError(f"cannot write there: {e.strerror}", str(folder), "give another --out") from None
    try:
        if not resume:
            _refuse_full(folder)
        yield folder
    finally:
        lock.release()
        if created and folder.is_dir() and not _contents(folder):
            shutil.rmtree(folder)  # nothing came of it: leave no trace


def _contents(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != LOCK)


def _refuse_full(folder: Path) -> None:
    others = _contents(folder)
    if others:
        raise ForewordError(
            f"the output folder is not empty (it holds {', '.join(others[:3])})",
            str(folder),
            "add --resume to go on with that run, or give another --out",
        )
