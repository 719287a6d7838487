"""Fixtures every test may use: offline, one thread, tiny model folders, small data files."""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports the hub's client, which reads these once: no test asks the internet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

import tiny

# CI tries the same examples every time; elsewhere every run looks for new ones.
settings.register_profile("foreword", derandomize="CI" in os.environ)
settings.load_profile("foreword")

Cli = Callable[..., tuple[int, str, str]]
ROWS = [
    ("my parcel is late", "complaint"),
    ("thank you for the quick reply", "no complaint"),
    ("nobody answers my invoice", "complaint"),
    ("the dog is brown and quick", "no complaint"),
    ("late again and nobody answers the fox", "complaint"),
    ("reply to the tweet", "no complaint"),
    ("parcel late late late", "complaint"),
    ("you are quick", "no complaint"),
    ("my invoice is lazy", "complaint"),
    ("praise for the fox who jumps over it", "no complaint"),
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as a local model folder."""
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny-llama")


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("Tweet text", "Label")) -> Path:
    """A two-column CSV file."""
    with path.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return path


@pytest.fixture
def train_csv(tmp_path: Path) -> Path:
    """Ten labelled rows in the columns of the guide."""
    return write_csv(tmp_path / "train.csv", ROWS)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the real entry point in this process: (exit code, stdout, stderr)."""

    from foreword.cli.main import main

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["foreword", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        finally:
            logging.getLogger("foreword").handlers.clear()  # its stream is this test's and ends with it
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def three_lines(result: tuple[int, str, str]) -> list[str]:
    code, _, err = result
    lines = err.strip().split("\n")
    assert code == 2, err
    assert [line.split(":")[0].strip() for line in lines] == ["error", "where", "fix"], err
    return lines
