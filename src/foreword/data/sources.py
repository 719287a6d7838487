"""Reading rows: CSV, JSONL and Parquet files, hub data sets, and the bundled set."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from foreword.data.raft import is_task, read_task
from foreword.errors import ForewordError, nearest
from foreword.hub_errors import HUB_ID, hub_error
from foreword.records import Row, Table

DATA_ID = re.compile(rf"({HUB_ID.pattern})(:[\w.-]+)?|[\w-]+")
"""A hub data set: user/name, user/name:config or a canonical name."""
BUNDLED = "bundled:"
INSTALL_DATASETS = "pip install 'foreword[data]' (brings datasets and pyarrow)"


def read_table(path: str, split: str = "train", revision: str | None = None) -> Table:
    """Reads all rows of a file, of a split of a hub data set or RAFT task folder, or of ``bundled:NAME``.

    Raises:
        ForewordError: no such file, wrong encoding, a malformed line (with its number),
            no rows, no such data set, no network.
    """
    if path.startswith(BUNDLED):
        file = resources.files("foreword") / "data" / "bundled" / path.removeprefix(BUNDLED) / f"{split}.csv"
        if not file.is_file():
            raise ForewordError(f"no bundled data set {path}, split {split}", path, "use bundled:complaints")
        return _table(*parse_csv(file.read_bytes(), path), origin=f"{path}, split {split}")
    file = Path(path).expanduser()
    reader = READERS.get(file.suffix.lower())
    if is_task(file):
        return _read_raft(file, split)
    if file.is_dir():
        fix = "give one .csv, .jsonl or .parquet file, or a RAFT task folder, which has a task.json"
        raise ForewordError("the data is a folder, not a file", path, fix)
    if file.exists():
        if reader is None:
            raise ForewordError(
                f"cannot tell the format of '{file.suffix or file.name}'",
                path,
                f"rename it to one of {', '.join(READERS)}",
            )
        return _table(*reader(_read_bytes(file), path), origin=path)
    local = bool(file.suffix) and file.parent.is_dir()  # data/rows.txt, mistyped, is no user/name
    if reader is None and DATA_ID.fullmatch(path) and not local:
        return read_hub(path, split, revision)
    raise _no_such_file(file, path)


def file_name(path: str) -> str:
    """A local file's name without its folders; ids and ``bundled:`` names as they are."""
    local = Path(path).is_absolute() or path.startswith((".", "~")) or Path(path).exists()
    return Path(path).name if local and not path.startswith(BUNDLED) else path


def rows_table(rows: Sequence[Row], origin: str = "the rows given") -> Table:
    """A table of rows that are already in memory (the Python API)."""
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    return _table(tuple(columns), [dict(r) for r in rows], origin=origin)


def parse_csv(content: bytes, where: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Parses CSV with a header line; every row must have as many fields as the header."""
    text = _decode(content, where)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a whole document in a field is no mistake
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for fields in reader:
            if fields:  # a blank line has none
                records.append((start, fields))
            start = reader.line_num + 1
    except csv.Error as e:
        raise ForewordError(
            f"malformed CSV: {e}",
            f"{where}, line {start}",  # where the record starts: an open quote runs on to the file's end
            'quote the field and double quotes inside it: "a ""b"" c"',
        ) from None
    if not records:
        raise _empty(where)
    columns = tuple(records[0][1])
    if len(set(columns)) < len(columns):
        twice = next(c for c in columns if columns.count(c) > 1)
        raise ForewordError(f"column '{twice}' stands twice in the header", where, "rename one of them")
    return columns, [_csv_row(columns, fields, f"{where}, line {line}") for line, fields in records[1:]]


def _csv_row(columns: tuple[str, ...], fields: list[str], place: str) -> dict[str, Any]:
    if len(fields) != len(columns):
        raise ForewordError(
            f"{len(fields)} fields where the header has {len(columns)}",
            place,
            "quote fields that contain commas or line breaks",
        )
    return dict(zip(columns, fields, strict=True))


def parse_jsonl(content: bytes, where: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Parses one JSON object a line; blank lines are passed over."""
    columns: dict[str, None] = {}
    rows = []
    for number, line in enumerate(_decode(content, where).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        row = _json(line, place)
        if not isinstance(row, dict):
            raise ForewordError("the line is no JSON object", place, 'write {"column": value, ...}')
        columns.update(dict.fromkeys(row))
        rows.append(row)
    if not rows:
        raise _empty(where)
    return tuple(columns), [{c: row.get(c) for c in columns} for row in rows]


def _json(line: str, place: str) -> Any:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # half an emoji (a lone \\ud83d) is no text
    except UnicodeEncodeError:
        raise ForewordError(
            "half of a surrogate pair: a cut emoji", place, "leave that character out, or write the whole pair"
        ) from None
    except (ValueError, RecursionError) as e:  # ValueError: also a number of thousands of digits
        reason = getattr(e, "msg", "") or str(e)
        raise ForewordError(f"malformed JSON: {reason}", place, "write one JSON object a line") from None
    return value


def parse_parquet(content: bytes, where: str) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Reads a Parquet file through pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ForewordError("reading Parquet needs pyarrow", where, INSTALL_DATASETS) from None
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as e:
        raise ForewordError(f"not a Parquet file: {str(e).splitlines()[0]}", where, "write it again") from None
    return tuple(table.column_names), table.to_pylist()


READERS: Mapping[str, Callable[[bytes, str], tuple[tuple[str, ...], list[dict[str, Any]]]]] = {
    ".csv": parse_csv,
    ".jsonl": parse_jsonl,
    ".parquet": parse_parquet,
}


def read_hub(name: str, split: str, revision: str | None) -> Table:
    """Reads one split of a hub data set through ``datasets``; ClassLabel names come along."""
    try:
        import datasets
    except ImportError:
        raise ForewordError("hub data sets need the library datasets", name, INSTALL_DATASETS) from None
    path, _, config = name.partition(":")
    datasets.disable_progress_bars()
    try:
        _ask_hub(path, revision)
        loaded = datasets.load_dataset(path, config or None, split=split, revision=revision)
    except Exception as e:  # datasets raises a dozen unrelated types; all mean the same to the user
        raise hub_error(e, name) or ForewordError(
            f"cannot load the data set: {(str(e).splitlines() or [type(e).__name__])[0][:200]}",
            f"{name}, split {split}",
            "check the id, the split and the network; a local file has a suffix: .csv, .jsonl, .parquet",
        ) from None
    class_names = {
        column: tuple(feature.names)
        for column, feature in loaded.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return _table(tuple(loaded.column_names), list(loaded), f"{name}, split {split}", class_names)


def _read_raft(folder: Path, split: str) -> Table:
    task = read_task(folder)
    file = task.file(split)
    columns, rows = parse_csv(_read_bytes(file), str(file))
    if not rows:
        raise _empty(str(file))
    return task.table(columns, rows, split)


def _ask_hub(name: str, revision: str | None) -> None:
    """One quick request, so that a wrong id or a missing network is known before datasets retries."""
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:
        HfApi().dataset_info(name, revision=revision, timeout=10)


def _table(
    columns: tuple[str, ...],
    rows: list[dict[str, Any]],
    origin: str,
    class_names: Mapping[str, tuple[str, ...]] | None = None,
) -> Table:
    if not rows:
        raise _empty(origin)
    return Table(tuple(rows), columns, origin, tuple(range(1, len(rows) + 1)), class_names or {})


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise ForewordError(f"cannot read the file: {e.strerror}", str(file), "check its permissions") from None


def _decode(content: bytes, where: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise ForewordError(
            f"not UTF-8: byte 0x{content[e.start]:02x}",
            f"{where}, line {line}",
            "save the file as UTF-8 (iconv -f LATIN1 -t UTF-8 old > new)",
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ForewordError("a NUL character: not a text file", f"{where}, line {line}", "save it as UTF-8 text")
    return text


def _empty(where: str) -> ForewordError:
    return ForewordError("there are no rows", where, "give a file with at least one row under its header")


def _no_such_file(file: Path, path: str) -> ForewordError:
    siblings: Iterator[str] = (p.name for p in file.parent.iterdir()) if file.parent.is_dir() else iter(())
    hint = nearest(file.name, siblings) if file.parent.is_dir() else f"there is no folder {file.parent}"
    return ForewordError("no such file", path, hint or f"files end in {', '.join(READERS)}; hub ids are user/name")
