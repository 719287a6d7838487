"""Dated results: one JSON file a run with what it was measured on."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Result = Mapping[str, Any]
FOLDER = Path(__file__).parent / "results"
PACKAGES = ("foreword", "torch", "transformers", "peft")
SAME = ("kind", "model", "rows", "row_count", "dtype")
"""What two results must share to be comparable."""


def facts(device: torch.device) -> dict[str, Any]:
    """Date and time (UTC), machine and versions; no host names and no paths."""
    now = datetime.datetime.now(datetime.UTC)
    machine: dict[str, Any] = {"arch": platform.machine(), "cpu": cpu_name(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "kind": "cpu" if device.type == "cpu" else "gpu", "date": now.date().isoformat(), "time": f"{now:%H:%M}",
        "machine": machine, "versions": {name: version(name) for name in PACKAGES},
    }  # fmt: skip


def cpu_name() -> str:
    """The processor as Linux names it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.machine())


def data_name(data: str) -> str:
    """A data set or model in public words: a name as it is, of a path its last two parts at most."""
    path = Path(data).expanduser()
    return "/".join(path.resolve().parts[-2:]) if path.exists() else data


def write(result: Result, folder: Path, name: str = "") -> Path:
    """Writes ``DATE-KIND[-NAME].json``; another run of the same day and name replaces it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join(filter(None, [result["date"], result["kind"], name])) + ".json")
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def read(path: Path) -> dict[str, Any]:
    """One file's content, with its name as ``file``."""
    return {**json.loads(path.read_text()), "file": path.name}


def newest(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """All results (of a kind), the newest first."""
    found = [read(path) for path in folder.glob("*.json")]
    chosen = [r for r in found if kind in (None, r["kind"])]
    return sorted(chosen, key=lambda r: (r["date"], r.get("time", ""), r["file"]), reverse=True)


def comparable(a: Result, b: Result) -> bool:
    """Whether two results were measured on the same model, rows, type and kind of device."""
    return all(a.get(key) == b.get(key) for key in SAME)
