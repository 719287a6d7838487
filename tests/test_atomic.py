"""Nothing is half-written: full disks, kills, and two runs in one folder."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foreword.artifact.atomic import write_atomic
from foreword.artifact.lock import LOCK, run_folder
from foreword.errors import ForewordError

# The kernel itself refuses the write: files of this process may not grow beyond 64 KiB.
FULL = """
import resource, signal, sys
from pathlib import Path
from foreword.artifact.atomic import write_atomic
from foreword.errors import ForewordError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_atomic(Path(sys.argv[1]), bytes(1 << 20), durable=sys.argv[2] == "True")
except ForewordError as e:
    sys.exit(str(e))
"""
HOLD = """
import sys
from pathlib import Path
from foreword.artifact.lock import run_folder
with run_folder(Path(sys.argv[1]), resume=False) as folder:
    (folder / "weights").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# Files


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    for content in (b"old", b"\0new\r\n"):
        write_atomic(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [True, False])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, str(path), str(durable)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write: File too large")
    assert f"where: {path}" in done.stderr
    assert path.read_text() == "old"
    assert files(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["none/file", "file/below", "folder", "x" * 300])
def test_a_place_that_cannot_be_written_is_three_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ForewordError, match="cannot write") as e:
        write_atomic(tmp_path / name, b"x")
    assert e.value.where == str(tmp_path / name)
    assert files(tmp_path) == ["file", "folder"]


# Run folders


def test_a_new_or_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "run", tmp_path / "empty"):
        with run_folder(folder, resume=False) as held:
            (held / "weights").write_text("x")
        assert files(folder) == [LOCK, "weights"]


def test_a_folder_with_files_needs_resume_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ForewordError, match=r"not empty \(it holds notes.txt\)") as e, run_folder(tmp_path, False):
        pytest.fail("entered")
    assert "--resume" in e.value.fix
    assert files(tmp_path) == ["notes.txt"], "no lock is left in somebody else's folder"
    with run_folder(tmp_path, resume=True) as folder:
        assert (folder / "notes.txt").read_text() == "mine"


def test_a_finished_run_is_not_written_over(tmp_path: Path) -> None:
    with run_folder(tmp_path / "run", resume=False) as folder:
        (folder / "weights").write_text("x")
    with pytest.raises(ForewordError, match=r"it holds weights\)"), run_folder(tmp_path / "run", resume=False):
        pytest.fail("entered")
    assert (tmp_path / "run" / "weights").read_text() == "x"


def test_a_failed_fresh_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ForewordError, match="no"), run_folder(tmp_path / "run", resume=False):
        raise ForewordError("no", "such", "model")
    assert files(tmp_path) == []


def test_a_failed_run_keeps_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", resume=False) as folder:
        (folder / "checkpoint").write_text("step 3")
        raise KeyboardInterrupt
    assert (tmp_path / "run" / "checkpoint").read_text() == "step 3"


def test_a_folder_removed_under_a_run_does_not_hide_the_runs_error(tmp_path: Path) -> None:
    with pytest.raises(ForewordError, match="cannot write"), run_folder(tmp_path / "run", resume=False) as folder:
        (folder / LOCK).unlink()
        folder.rmdir()
        write_atomic(folder / "file", b"x")


def test_a_folder_in_use_by_another_process_is_refused_until_that_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for resume in (True, False):
            with pytest.raises(ForewordError, match="another run is writing here"), run_folder(run, resume):
                pytest.fail("entered")
        assert (run / "weights").read_text() == "half"
        other.send_signal(signal.SIGKILL)
    with run_folder(run, resume=True) as folder:
        assert files(folder) == [LOCK, "weights"], "a killed run's lock does not block"


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ForewordError, match="a file, not a folder"), run_folder(tmp_path / "file", resume=False):
        pytest.fail("entered")
    with pytest.raises(ForewordError, match="cannot write there"), run_folder(tmp_path / "file" / "run", resume=False):
        pytest.fail("entered")
