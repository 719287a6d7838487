"""Versions of the libraries that matter to a result, without loading them."""

from __future__ import annotations

from importlib.metadata import version

LIBRARIES = ("foreword", "torch", "transformers", "tokenizers")


def library_versions() -> dict[str, str]:
    """Name -> installed version, Foreword first."""
    return {name: version(name) for name in LIBRARIES}
