"""The architecture: arrows point down only, nothing happens at import, no torch below the line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "foreword"
LAYERS = [
    {"errors", "config", "recipe", "records", "hub_errors", "versions"},
    {"parallel"},
    {"data"},
    {"checks"},
    {"tuning"},
    {"prompts"},
    {"backbone"},
    {"artifact"},
    {"evaluation"},
    {"training"},
    {"report"},
    {"jobs"},
    {"serving"},
    {"api"},
    {"cli"},
]
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))
NO_TORCH = ["errors", "config", "recipe", "checks", "records", "hub_errors", "versions", "data", "tuning"]


def part_of(file: Path) -> str:
    first = file.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(file: Path) -> set[str]:
    """The parts of the package a file imports, lazy imports included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name == "foreword" and isinstance(node, ast.ImportFrom):
                found |= {a.name for a in node.names}
            elif name.startswith("foreword."):
                found.add(name.split(".")[1])
    return found


def test_every_part_has_its_place() -> None:
    assert {part_of(f) for f in FILES} - {"__init__", "__main__"} == set(RANK)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_arrows_point_down_only(file: Path) -> None:
    part = part_of(file)
    if part in ("__init__", "__main__"):
        return
    upward = {i for i in imports(file) if RANK[i] > RANK[part]}
    assert not upward, f"{file.name} in {part} imports {upward}"


def test_the_layers_without_torch_never_load_it() -> None:
    modules = [
        "foreword." + ".".join(f.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for f in FILES
        if part_of(f) in [*NO_TORCH, "cli"]
    ]
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_files_and_functions_stay_small() -> None:
    long_files = {f.name: n for f in FILES if (n := len(f.read_text().splitlines())) > 400}
    long_functions = {
        f"{f.name}:{node.name}": n
        for f in FILES
        for node in ast.walk(ast.parse(f.read_text()))
        if isinstance(node, ast.FunctionDef) and (n := (node.end_lineno or 0) - node.lineno) > 75
    }
    assert not long_files
    assert not long_functions
