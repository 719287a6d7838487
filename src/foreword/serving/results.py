"""A file of results that is written as rows come, survives a kill, and can be gone on with.

Rows go to ``.NAME.partial``, whole lines only, and the file gets its name when the last one is in it. Beside it
``.NAME.partial.json`` says which job it is of, so that no other job is mixed into it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from foreword.artifact.atomic import write_atomic
from foreword.errors import ForewordError

FORMATS = (".csv", ".jsonl")
FLUSH_SECONDS = 1.0
FLUSH_ROWS = 256
"""A kill loses at most so much."""


def partial_of(out: Path) -> Path:
    """The file of the rows so far."""
    return out.with_name(f".{out.name}.partial")


def header_of(out: Path) -> Path:
    """The file that says which job the rows so far are of."""
    return out.with_name(f".{out.name}.partial.json")


def check_target(out: Path, resume: bool) -> None:
    """Refuses, before anything is loaded, what cannot be written or would overwrite rows that a killed run left."""
    if out.suffix not in FORMATS:
        raise ForewordError(f"cannot write '{out.suffix or out.name}'", str(out), "name a .csv or .jsonl file")
    if not out.absolute().parent.is_dir():
        raise ForewordError("there is no such folder", str(out.parent), f"mkdir -p {out.parent}")
    if out.is_dir():
        raise ForewordError("the output is a folder, not a file", str(out), "give another --out")
    if not resume and partial_of(out).exists():
        raise ForewordError(
            "a run that was stopped has left its rows here",
            str(partial_of(out)),
            "add --resume to go on with that run, delete the file, or give another --out",
        )


class Results:
    """The rows so far. ``done`` of them were there when it was opened."""

    def __init__(self, out: Path, columns: Sequence[str], unit: int) -> None:
        self.out, self.columns = out, tuple(columns)
        self.path = partial_of(out)
        self._lines: list[bytes] = []
        self._flushed = -math.inf
        self._file = self._open()
        self.done = self._keep_whole(unit)
        if out.suffix == ".csv" and self._file.tell() == 0:
            self._lines.append(_csv_line(self.columns))

    def add(self, values: Sequence[Any]) -> None:
        """Takes the next row. The first goes to the file at once, others when a second has passed or they are many."""
        self._lines.append(self._line(values))
        if len(self._lines) >= FLUSH_ROWS or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hands the waiting rows to the system in one piece, so that a kill cuts none in two."""
        content = b"".join(self._lines)
        self._lines.clear()
        self._flushed = time.monotonic()
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as e:
            raise _cannot_write(e, self.path) from None

    def finish(self) -> None:
        """Gives the file its name."""
        self.flush()
        try:
            os.fsync(self._file.fileno())
            self.path.replace(self.out)
            header_of(self.out).unlink(missing_ok=True)
        except OSError as e:
            raise _cannot_write(e, self.path) from None

    def close(self) -> None:
        """Keeps what there is; a full disk has been reported before."""
        try:
            self.flush()
        finally:
            self._file.close()

    def _open(self) -> BinaryIO:
        try:
            self.path.touch()
            return self.path.open("r+b", buffering=0)
        except OSError as e:
            raise _cannot_write(e, self.path) from None

    def _keep_whole(self, unit: int) -> int:
        """Cuts the file behind its last whole row (of a multiple of ``unit`` rows); returns how many are left."""
        header = 1 if self.out.suffix == ".csv" else 0
        end = kept = 0
        for count, at in enumerate(record_ends(self.path, self.out.suffix), start=1 - header):
            if count % unit == 0:
                kept, end = count, at
        self._file.truncate(end)
        self._file.seek(end)
        return kept

    def _line(self, values: Sequence[Any]) -> bytes:
        if self.out.suffix == ".csv":
            return _csv_line([_cell(v) for v in values])
        return (
            json.dumps(dict(zip(self.columns, values, strict=True)), ensure_ascii=False, default=str).encode() + b"\n"
        )


@contextmanager
def open_results(
    out: Path, columns: Sequence[str], job: Mapping[str, Any], resume: bool, unit: int = 1
) -> Iterator[Results]:
    """Opens the partial file, new or where it ended, and holds it for this process.

    Args:
        out: the file it will be.
        columns: of the results.
        job: what these rows come from, JSON-safe: a file of another job is refused.
        resume: go on with the file that is there, if there is one.
        unit: rows that are computed together; only whole units are kept.
    """
    header = header_of(out)
    with _alone(out):
        if resume and partial_of(out).exists():
            _same_job(header, job)
        else:
            write_atomic(header, json.dumps(job, indent=2, ensure_ascii=False).encode())
        results = Results(out, columns, unit)
        try:
            yield results
        finally:
            results.close()


def record_ends(path: Path, suffix: str) -> Iterator[int]:
    """Where each whole record ends, in bytes. A line break between quotes ends no CSV record."""
    at = quotes = 0
    with path.open("rb") as f:
        for line in f:
            at += len(line)
            quotes += line.count(b'"') if suffix == ".csv" else 0
            if line.endswith(b"\n") and quotes % 2 == 0:
                yield at


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ForewordError("another run is writing here", str(out), "wait for it, or give another --out") from None
    except OSError as e:
        raise _cannot_write(e, out) from None
    try:
        yield
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _same_job(header: Path, job: Mapping[str, Any]) -> None:
    try:
        before = json.loads(header.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ForewordError(
            "nothing says which job the rows so far are of", str(header), "delete the partial file beside it"
        ) from None
    now = json.loads(json.dumps(job))
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        what = ", ".join(_difference(k, before.get(k), now.get(k)) for k in changed)
        raise ForewordError(
            f"--resume goes on with the same job, but this changed: {what}",
            str(header),
            "give what the run was started with, delete the partial file, or give another --out",
        )


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
        return f"{key} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    said = f"{key} ({before!r} -> {now!r})"
    return said if len(said) < 100 else key


def _csv_line(values: Sequence[Any]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerow(values)
    return file.getvalue().encode()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def _cannot_write(e: OSError, path: Path) -> ForewordError:
    return ForewordError(f"cannot write: {e.strerror}", str(path), "free some space, then go on with --resume")
