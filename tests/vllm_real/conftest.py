"""Tests against the real vLLM, in an environment of its own: ``make test-vllm``. Nothing else collects them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tiny_vllm
from foreword.backbone.load import Backbone, load_backbone
from foreword.config import ModelConfig

PYTHON = os.environ.get("FOREWORD_VLLM_PYTHON", "")
if not PYTHON:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    return PYTHON


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vllm.save(tmp_path_factory.mktemp("vllm") / "tiny")


@pytest.fixture(scope="session")
def backbone(folder: Path) -> Backbone:
    return load_backbone(ModelConfig(str(folder)))
