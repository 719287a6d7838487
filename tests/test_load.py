"""A soft prompt in use: what predict, generate and evaluate take, and backbones that do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import foreword
import tiny
from conftest import ROWS
from foreword.artifact.folder import write_adapter
from foreword.artifact.peft_types import peft_config
from foreword.backbone.generate import Sampling
from foreword.backbone.load import load_backbone
from foreword.config import ModelConfig, PromptConfig
from foreword.errors import ForewordError
from foreword.jobs.prepare import memory_explained


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> foreword.Foreword:
    rows = [{"title": t[:6], "body": t, "label": y} for t, y in ROWS]
    return foreword.train(
        model=str(model_folder),
        data=rows,
        eval_data=rows[:4],
        template="{title} : {body} Label :",
        label="label",
        out=tmp_path_factory.mktemp("runs") / "run",
        prompt={"virtual_tokens": 4},
        train={"epochs": 2},
        quiet=True,
    )


def test_a_run_loads_as_it_was_trained(task: foreword.Foreword) -> None:
    again = foreword.load(task.adapter.folder)
    rows = [{"title": "my", "body": "my parcel"}]
    assert again.predict(rows) == task.predict(rows)
    assert again.scores == task.scores
    assert again.scores["protocol"].endswith("4 of which were also trained on")


def test_rows_predict_the_same_alone_and_together_in_any_order(task: foreword.Foreword) -> None:
    rows = [{"title": t[:4], "body": t * (i + 1)} for i, (t, _) in enumerate(ROWS[:5])]
    together = task.predict(rows)
    backwards = task.predict(rows[::-1])[::-1]
    assert [p.label for p in backwards] == [p.label for p in together]
    for row, found in zip(rows, together, strict=True):
        (alone,) = task.predict([row])
        assert dict(alone.probabilities) == pytest.approx(dict(found.probabilities), abs=1e-5)


def test_a_score_on_the_training_rows_says_so(task: foreword.Foreword) -> None:
    rows = [{"title": t[:6], "body": t, "label": y} for t, y in ROWS]
    assert task.evaluate(rows)["protocol"].endswith("the rows it was trained on")
    assert "trained on" not in task.evaluate(rows[1:])["protocol"]


def test_wrong_rows_are_refused_by_name(task: foreword.Foreword) -> None:
    with pytest.raises(ForewordError, match="has 2 columns"):
        task.predict(["just text"])
    with pytest.raises(ForewordError, match="no column 'body'"):
        task.predict([{"title": "x", "bdy": "y"}])
    with pytest.raises(ForewordError, match="list of rows is expected"):
        task.predict({"title": "x", "body": "y"})  # type: ignore[arg-type]
    assert task.predict([]) == []
    assert task.generate([]) == []


def test_streamed_text_is_the_generated_text(task: foreword.Foreword) -> None:
    row, short = {"title": "my", "body": "my parcel"}, Sampling(max_new_tokens=6)
    assert "".join(task.stream(row, short)).removeprefix(" ") == task.generate([row], short)[0]


def test_label_words_and_template_can_be_given_to_an_adapter_without_a_sidecar(
    task: foreword.Foreword, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(task.adapter.folder, bare)
    (bare / "foreword.json").unlink()
    words = {"complaint": "complaint", "no complaint": "no complaint"}
    loaded = foreword.load(bare, template="{title} : {body} Label :", label_words=words)
    rows = [{"title": "my", "body": "my parcel"}]
    assert loaded.predict(rows) == task.predict(rows)
    raw = foreword.load(bare)
    with pytest.raises(ForewordError, match="has no classes"):
        raw.predict(["x"])
    assert isinstance(raw.generate(["my parcel"], Sampling(max_new_tokens=3))[0], str)


def test_the_device_and_type_asked_for_are_those_that_are_used(task: foreword.Foreword) -> None:
    loaded = foreword.load(task.adapter.folder, device="cpu", dtype="bfloat16")
    assert (loaded.backbone.device.type, loaded.backbone.dtype) == ("cpu", torch.bfloat16)
    with pytest.raises(ForewordError, match="no device"):
        foreword.load(task.adapter.folder, device="cuda:97")


def test_a_soft_prompt_of_another_width_is_refused_naming_both(model_folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(ModelConfig(str(model_folder)))
    tensors = {"prompt_embeddings": torch.zeros(3, 2 * tiny.HIDDEN)}
    config = peft_config(
        "PROMPT_TUNING", tensors, model_config=backbone.config, base="maker/wide", revision=None, prompt=PromptConfig()
    )
    write_adapter(tmp_path / "wide", tensors, config, None)
    with pytest.raises(ForewordError, match="64 wide, the backbone 32") as caught:
        foreword.load(tmp_path / "wide", model=str(model_folder), force=True)
    assert "maker/wide" in caught.value.where
    assert str(model_folder) in caught.value.where


def test_running_out_of_memory_names_the_knob() -> None:
    with pytest.raises(ForewordError, match="out of memory") as caught, memory_explained("turn this knob"):
        torch.empty(1 << 50)
    assert caught.value.fix == "turn this knob"
    with pytest.raises(RuntimeError, match="something else"), memory_explained("turn this knob"):
        raise RuntimeError("something else")
