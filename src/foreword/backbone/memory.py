"""Memory: how much a piece of work takes at its peak, and how much is free."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

MB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Peak memory from its making on, above what was in use then.

    On CUDA what torch allocates; on Linux the process's resident memory; elsewhere unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = _resident("VmRSS") if _CLEAR.exists() and _reset_peak() else None

    @property
    def size(self) -> int | None:
        """Bytes; None where they cannot be measured."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return max(0, _resident("VmHWM") - self.before)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    return int(psutil.virtual_memory().available)


def _reset_peak() -> bool:
    """Sets VmHWM back to the resident size; false where the system cannot.

    Pages that malloc keeps for later are given back first: work that reuses them would seem to need none.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc has it, musl does not
        trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    """A memory field of /proc/self/status in bytes."""
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
