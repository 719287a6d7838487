"""Reading rows: what was written comes back, and what is broken is named by file and line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.data.sources import parse_csv, parse_jsonl, read_table, rows_table
from foreword.errors import ForewordError

CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['say "hi", twice', "two\nlines", "two\r\nlines", "\r", '"', ",", "", " ", "\u2028", "\ufeff", "'"]
)
TABLES = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=6)
)
DIALECTS: list[dict[str, Any]] = [
    {"lineterminator": "\r\n", "quoting": csv.QUOTE_MINIMAL},
    {"lineterminator": "\r\n", "quoting": csv.QUOTE_ALL},
    {"lineterminator": "\n", "quoting": csv.QUOTE_ALL},  # the minimum would leave a lone \r unquoted
]


def csv_bytes(rows: list[list[str]], **options: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(rows)
    return text.getvalue().encode()


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(path: str) -> ForewordError:
    with pytest.raises(ForewordError) as e:
        read_table(path)
    return e.value


# CSV


@settings(max_examples=100, deadline=None)
@given(TABLES, st.sampled_from(DIALECTS), st.booleans())
def test_any_table_comes_back_from_csv(table: list[list[str]], dialect: dict[str, Any], mark: bool) -> None:
    header = [f"column {i}" for i in range(len(table[0]))]
    content = csv_bytes([header, *table], **dialect)
    columns, rows = parse_csv((b"\xef\xbb\xbf" if mark else b"") + content, "t.csv")
    assert columns == tuple(header)
    assert [list(row.values()) for row in rows] == table
    assert all(list(row) == header for row in rows)


def test_a_spreadsheets_csv_with_mark_windows_lines_and_quotes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv", '\ufefftext,label\r\n"late, ""again""\r\nand again",complaint\r\n\r\nok,praise\r\n'
    )
    table = read_table(path)
    assert table.columns == ("text", "label")
    assert table.rows[0] == {"text": 'late, "again"\r\nand again', "label": "complaint"}
    assert table.rows[1] == {"text": "ok", "label": "praise"}
    assert table.numbers == (1, 2)
    assert table.origin == path


def test_a_field_of_a_whole_document_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", csv_bytes([["text"], ["word, " * 50_000]]))
    assert read_table(path).rows[0]["text"] == "word, " * 50_000


@pytest.mark.parametrize(
    ("lines", "line", "what"),
    [
        (["a,b", "1,2", "1,2,3"], 3, "3 fields where the header has 2"),
        (["a,b", '"1\n1",2', "1"], 4, "1 fields where the header has 2"),
        (["a,b", "", "1,2", '"x"y,2'], 4, "malformed CSV"),
        (["a,b", "1,2", '"open,2', "3,4", "5,6"], 3, "malformed CSV"),
        (['"a,b', "1,2"], 1, "malformed CSV"),
    ],
)
def test_a_malformed_csv_line_is_named_by_its_number(tmp_path: Path, lines: list[str], line: int, what: str) -> None:
    path = write(tmp_path / "t.csv", "\n".join(lines) + "\n")
    error = refused(path)
    assert what in error.what
    assert error.where == f"{path}, line {line}"


def test_a_column_that_stands_twice_is_named(tmp_path: Path) -> None:
    assert "'text'" in refused(write(tmp_path / "t.csv", "text,label,text\na,b,c\n")).what


# JSONL

VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=10)
    | st.just("\u2028 \x85")
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), VALUES, min_size=1, max_size=3), min_size=1), st.booleans())
def test_any_rows_come_back_from_jsonl(given_rows: list[dict[str, Any]], ascii_only: bool) -> None:
    content = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in given_rows).encode()
    columns, rows = parse_jsonl(content, "t.jsonl")
    assert columns == tuple(dict.fromkeys(key for row in given_rows for key in row))
    assert rows == [{c: row.get(c) for c in columns} for row in given_rows]


def test_jsonl_with_mark_windows_lines_and_blank_lines(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "t.jsonl", '\ufeff{"a": 1}\r\n\r\n{"b": 2}\r\n'))
    assert table.columns == ("a", "b")
    assert table.rows == ({"a": 1, "b": None}, {"a": None, "b": 2})


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ('{"a": 1', "malformed JSON"),
        ("{'a': 1}", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('{"a": ' + "1" * 5000 + "}", "malformed JSON"),
        ("[1, 2]", "the line is no JSON object"),
        ("3", "the line is no JSON object"),
        (r'{"a": "cut \ud83d"}', "surrogate"),
    ],
)
def test_a_malformed_jsonl_line_is_named_by_its_number(tmp_path: Path, bad: str, what: str) -> None:
    path = write(tmp_path / "t.jsonl", '{"a": 0}\n\n' + bad + '\n{"a": 2}\n')
    error = refused(path)
    assert what in error.what
    assert error.where == f"{path}, line 3"


# Parquet


def test_parquet_comes_back_with_its_types(tmp_path: Path) -> None:
    columns = {"text": ["a, b", "c\nd", ""], "label": [1, 0, None], "score": [0.5, 1.0, None]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_table(str(tmp_path / "t.parquet"))
    assert table.columns == ("text", "label", "score")
    assert [list(row.values()) for row in table.rows] == [list(row) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "scribbled"])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(100)]}), path)
    whole = path.read_bytes()
    half = len(whole) // 2
    write(path, {"empty": b"", "text": b"a,b", "cut": whole[:half], "scribbled": b"\xff" * half + whole[half:]}[damage])
    error = refused(str(path))
    assert "not a Parquet file" in error.what
    assert error.where == str(path)


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "t.parquet")
    assert refused(str(tmp_path / "t.parquet")).what == "there are no rows"


# Whole files


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("content", "what"),
    [("Größe\n".encode("latin-1"), "not UTF-8: byte 0xf6"), (b"a\0b", "NUL"), ("a".encode("utf-16"), "UTF-8")],
)
def test_a_wrong_encoding_is_named_with_its_line(tmp_path: Path, suffix: str, content: bytes, what: str) -> None:
    path = write(tmp_path / f"t.{suffix}", b"\n\n" + content)
    error = refused(path)
    assert what in error.what
    assert error.where == f"{path}, line 3"


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "\r\n"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    error = refused(path)
    assert (error.what, error.where) == ("there are no rows", path)


def test_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert refused(write(tmp_path / "t.csv", "text,label\n")).what == "there are no rows"


def test_suffixes_may_be_upper_case(tmp_path: Path) -> None:
    assert len(read_table(write(tmp_path / "T.CSV", "a\n1\n"))) == 1


def test_a_missing_file_suggests_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "a\n1\n")
    error = refused(str(tmp_path / "trian.csv"))
    assert (error.what, error.fix) == ("no such file", "did you mean 'train.csv'?")


def test_a_missing_file_in_a_missing_folder_says_so(tmp_path: Path) -> None:
    assert refused(str(tmp_path / "none" / "t.csv")).fix == f"there is no folder {tmp_path / 'none'}"


def test_a_mistyped_relative_path_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "rows.jsonl", '{"a": 1}')
    monkeypatch.chdir(tmp_path)
    error = refused("data/rows.json")
    assert (error.what, error.fix) == ("no such file", "did you mean 'rows.jsonl'?")


def test_a_hub_data_set_out_of_reach_is_named() -> None:
    error = refused("someone/does-not-exist")
    assert error.what.startswith("cannot load the data set")
    assert error.where == "someone/does-not-exist, split train"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "folder" in refused(str(tmp_path)).what


@pytest.mark.parametrize("name", ["rows.txt", "rows"])
def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path, name: str) -> None:
    error = refused(write(tmp_path / name, "a\n1\n"))
    assert "cannot tell the format" in error.what
    assert error.fix == "rename it to one of .csv, .jsonl, .parquet"


# Rows without a file


@pytest.mark.parametrize(("split", "count"), [("train", 50), ("test", 100)])
def test_the_bundled_rows_are_there_and_balanced(split: str, count: int) -> None:
    table = read_table("bundled:complaints", split)
    labels = [row["label"] for row in table.rows]
    assert len(table) == count
    assert set(labels) == {"complaint", "no complaint"}
    assert labels.count("complaint") == count // 2
    assert all(row["text"].strip() for row in table.rows)


def test_no_bundled_text_is_in_both_splits_or_twice() -> None:
    texts = [row["text"].lower().split() for s in ("train", "test") for row in read_table("bundled:complaints", s).rows]
    assert len({tuple(t) for t in texts}) == 150


@pytest.mark.parametrize(("path", "split"), [("bundled:complaint", "train"), ("bundled:complaints", "validation")])
def test_an_unknown_bundled_set_or_split_is_refused(path: str, split: str) -> None:
    with pytest.raises(ForewordError, match=f"no bundled data set {path}, split {split}"):
        read_table(path, split)


def test_rows_in_memory_become_a_table_with_all_their_columns() -> None:
    table = rows_table([{"a": 1}, {"b": 2, "a": 3}])
    assert table.columns == ("a", "b")
    assert table.numbers == (1, 2)
    picked = table.pick([1])
    assert (picked.rows, picked.numbers) == (({"b": 2, "a": 3},), (2,))
    with pytest.raises(ForewordError, match="no rows"):
        rows_table([])


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "~/nowhere", ".hidden/nowhere"])
def test_a_path_that_looks_local_is_never_asked_of_the_hub(path: str) -> None:
    with pytest.raises(ForewordError, match="no such file"):
        read_table(path)
