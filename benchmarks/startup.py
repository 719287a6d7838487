"""How long Foreword takes to answer and to reach its first training step, as a user waits for it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import summary

POLL_SECONDS = 0.01
PATIENCE_SECONDS = 300.0
FOREWORD = (sys.executable, "-m", "foreword")


def measure_startup(model: str, data: str, text: str, label: str, device: str, runs: int) -> dict[str, Any]:
    """Seconds of ``foreword --help``, and of ``foreword train`` up to its first step.

    Each run is a process of its own; the files are in the system's cache, as after a first use.
    """
    options = ["--model", model, "--data", data, "--text", text, "--label", label, f"model.device={device}"]
    waits = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            waits.append(first_step([*FOREWORD, "train", *options, "--out", str(out)], out / "metrics.jsonl"))
    return {"help": summary([_help_seconds() for _ in range(runs)]), "first_step": summary(waits)}


def first_step(command: Sequence[str], metrics: Path) -> float:
    """Seconds from the start of ``command`` to its first step, without the step itself; then ends it.

    Args:
        command: a program that appends ``{"event": "step", "seconds": ...}`` lines to ``metrics``.
        metrics: its metrics file, which need not exist yet.

    Raises:
        RuntimeError: it ended, or five minutes passed, before a step.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            while (step := _first_event(metrics)) is None:
                waited = time.perf_counter() - began
                if process.poll() is not None or waited > PATIENCE_SECONDS:
                    output.seek(0)
                    said = output.read().decode(errors="replace")[-500:]
                    raise RuntimeError(f"no first step after {waited:.1f} s: {said}")
                time.sleep(POLL_SECONDS)
            return time.perf_counter() - began - float(step["seconds"])
        finally:
            _end(process)


def _first_event(metrics: Path) -> dict[str, Any] | None:
    """The first whole step line of a metrics file."""
    if not metrics.is_file():
        return None
    for line in metrics.read_text().splitlines(keepends=True):
        if line.endswith("\n") and (event := json.loads(line)).get("event") == "step":
            return dict(event)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=60)  # training finishes the step in hand
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _help_seconds() -> float:
    began = time.perf_counter()
    subprocess.run([*FOREWORD, "--help"], check=True, capture_output=True)
    return time.perf_counter() - began
