"""Writing files so that a crash or a full disk never leaves half of one."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from foreword.errors import ForewordError


def write_atomic(path: Path, content: bytes, durable: bool = True) -> None:
    """Writes beside the file and renames over it.

    Args:
        path: the file.
        content: its bytes.
        durable: flush to the disk before renaming (survives a power cut, not only a kill).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as f:
            f.write(content)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        partial.replace(path)
    except OSError as e:
        with suppress(OSError):  # where the folder itself is the trouble there is nothing to remove
            partial.unlink()
        raise ForewordError(
            f"cannot write: {e.strerror}", str(path), "free some space or choose another --out folder"
        ) from None
