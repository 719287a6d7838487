"""Docs drift: the README's tree, help and Python lines are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SOURCE = ROOT / "src" / "foreword"


def test_the_tree_names_every_file_once_and_no_other() -> None:
    block = re.search(r"```text\nsrc/foreword/\n(.*?)```", README, re.S)
    assert block
    named: list[str] = []
    folders_of: dict[int, str] = {2: ""}  # by indentation
    for line in block.group(1).splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        named.append(folders_of[depth] + name)
        if name.endswith("/"):
            folders_of[depth + 2] = named[-1]
    sources = [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.html")]
    files = {str(f.relative_to(SOURCE)) for f in sources if f.name not in ("__init__.py", "__main__.py")}
    folders = {f"{Path(f).parent}/" for f in files if "/" in f}
    assert sorted(named) == sorted(files | folders | {"recipes/"})


def test_the_command_line_block_is_the_real_help() -> None:
    block = re.search(r"```console\n\$ foreword --help\n(.*?)```", README, re.S)
    assert block
    done = subprocess.run(
        [Path(sys.executable).with_name("foreword"), "--help"], capture_output=True, text=True, check=True,
        env={"COLUMNS": "80", "PATH": "/usr/bin", "TERM": "dumb"},
    )  # fmt: skip
    assert _squeezed(block.group(1)) == _squeezed(done.stdout)


def test_the_python_example_only_uses_what_exists() -> None:
    import foreword

    example = re.search(r"```python\n(.*?)```", README, re.S)
    assert example
    lines = [line for line in example.group(1).splitlines() if line.strip()]
    assert len(lines) <= 12
    used = set(re.findall(r"foreword\.(\w+)", example.group(1)))
    assert used
    assert all(hasattr(foreword, name) for name in used)
    compile(example.group(1), "README", "exec")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def _squeezed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
