"""A backbone whose weights do not fit: it scores as one whose weights do, and says that it cannot be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import foreword
from conftest import ROWS
from foreword.backbone.load import load_backbone
from foreword.config import ModelConfig
from foreword.errors import ForewordError

DATA = [{"text": text, "label": label} for text, label in ROWS]
LITTLE = {"cpu": "60KB"}
"""Of the tiny model's 170 kB: embedding and a layer stay, the rest is fetched from disk for every pass."""


@pytest.fixture(scope="module")
def run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("offload") / "run"
    train(str(model_folder), out)
    return out


def train(model: Any, out: Path) -> foreword.Foreword:
    return foreword.train(
        model=model, data=DATA, text="text", label="label", out=out, quiet=True, train={"epochs": 1}
    )  # fmt: skip


def test_weights_that_are_elsewhere_score_the_same(run: Path) -> None:
    whole, spread = foreword.load(run), foreword.load(run, device_map="auto", max_memory=LITTLE)
    assert spread.backbone.offloaded
    assert not whole.backbone.offloaded
    assert spread.backbone.device == torch.device("cpu")
    texts = [r["text"] for r in DATA]
    for mine, reference in zip(spread.predict(texts), whole.predict(texts), strict=True):
        assert mine.probabilities == pytest.approx(reference.probabilities, abs=1e-6)


def test_the_backbone_is_known_again(run: Path, model_folder: Path) -> None:
    spread = load_backbone(ModelConfig(str(model_folder), device_map="auto", max_memory=LITTLE))
    assert spread.fingerprint == load_backbone(ModelConfig(str(model_folder))).fingerprint


def test_nothing_is_trained_through_weights_that_are_elsewhere(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ForewordError, match="where no gradient passes") as caught:
        train({"id": str(model_folder), "device_map": "auto", "max_memory": LITTLE}, tmp_path / "run")
    assert "fsdp" in caught.value.fix


def test_where_all_fits_training_is_what_it_was(model_folder: Path, run: Path, tmp_path: Path) -> None:
    train({"id": str(model_folder), "device_map": "auto"}, tmp_path / "run")
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()


def test_another_map_is_refused(model_folder: Path) -> None:
    with pytest.raises(ForewordError, match=r"model\.device_map is 'balanced_low_0'"):
        load_backbone(ModelConfig(str(model_folder), device_map="balanced_low_0"))
