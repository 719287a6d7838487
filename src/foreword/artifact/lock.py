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
        others = sorted(p.name for p in folder.iterdir() if p.name != LOCK)
        if others and not resume:
            raise ForewordError(
                f"the output folder is not empty (it holds {', '.join(others[:3])})",
                str(folder),
                "add --resume to go on with that run, or give another --out",
            )
        yield folder
    finally:
        lock.release()
        if created and all(p.name == LOCK for p in folder.iterdir()):
            shutil.rmtree(folder)  # nothing came of it: leave no trace
