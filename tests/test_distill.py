"""Texts and few-shot examples made into virtual tokens, and several tasks trained as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foreword
import tiny
from conftest import ROWS, write_csv
from foreword.artifact.folder import WEIGHTS, read_adapter
from foreword.backbone.attach import no_prompt, reading
from foreword.config import Recipe
from foreword.data.sources import rows_table
from foreword.errors import ForewordError
from foreword.evaluation.agreement import agreement, candidates, softened
from foreword.jobs import training
from foreword.jobs.distill import distill
from foreword.jobs.fewshot import few_shot
from foreword.jobs.multitask import multitask
from foreword.jobs.prepare import make_encoder
from foreword.jobs.study import class_targets
from foreword.recipe import merge
from foreword.records import Segment, Task
from test_family import _after

TEMPLATE = "Tweet : {text} Label :"
TASK = Task(TEMPLATE, " ", "label", ("complaint", "no complaint"), ("complaint", "no complaint"))
LONG = "the quick brown fox jumps over the lazy dog and writes an invoice. " * 3


def recipe(**sections: dict[str, Any]) -> Recipe:
    prompt = {"method": "cartridge", "virtual_tokens": 6, **sections.pop("prompt", {})}
    train = {"epochs": 8, "batch_size": 4, "lr": 0.01, **sections.pop("train", {})}
    return merge(Recipe(), {**sections, "prompt": prompt, "train": train}, "test")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    (tmp_path / "long.txt").write_text(LONG)
    return tmp_path / "long.txt"


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "foreword.json").read_text())["training"]
    return found


# --- a text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cartridge", "prefix-tuning", "prompt-tuning", "residual"])
def test_a_text_is_made_into_a_few_tokens(model_folder: Path, tmp_path: Path, text_file: Path, method: str) -> None:
    choice = recipe(
        model={"id": str(model_folder)}, prompt={"method": method},
        distill={"text": str(text_file), "queries": 12, "answer_tokens": 5, "candidates": 8},
    )  # fmt: skip
    distill(choice, tmp_path / "run")
    found = facts(tmp_path / "run")
    assert found["text_tokens"] == len(tiny.tokenizer()(LONG)["input_ids"])
    assert found["tokens_saved"] == found["text_tokens"] - 6
    assert 0 <= found["agreement (distilled)"] <= 1
    losses = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epoch = [np.mean([e["loss"] for e in losses if e.get("epoch") == n]) for n in (1, 8)]
    assert epoch[1] < epoch[0]
    loaded = foreword.load(tmp_path / "run")
    assert loaded.prompt.tokens == 6
    assert loaded.generate(["the lazy dog", "an invoice"])[1] == loaded.generate(["an invoice"])[0]
    assert read_adapter(tmp_path / "run").config["peft_type"] == {
        "cartridge": "CARTRIDGE", "prefix-tuning": "PREFIX_TUNING"
    }.get(method, "PROMPT_TUNING")  # fmt: skip


def test_a_distillation_resumed_is_uninterrupted_bit_for_bit(
    model_folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = recipe(
        model={"id": str(model_folder)}, distill={"text": str(text_file), "queries": 8, "answer_tokens": 4}
    )  # fmt: skip
    distill(choice, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training, "interruptible", _after(3))
        with pytest.raises(KeyboardInterrupt):
            distill(choice, tmp_path / "cut")
    text_file.write_text(LONG + " and more")
    with pytest.raises(ForewordError, match="are not those"):
        distill(choice, tmp_path / "cut", resume=True)
    text_file.write_text(LONG)
    distill(choice, tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_the_sink_token_stays_as_it_was_read(model_folder: Path, tmp_path: Path, text_file: Path) -> None:
    choice = recipe(
        model={"id": str(model_folder)}, distill={"text": str(text_file), "queries": 8, "answer_tokens": 4}
    )  # fmt: skip
    backbone = distill(choice, tmp_path / "run")
    teacher = reading(backbone, tiny.tokenizer()(LONG)["input_ids"])
    kept = read_adapter(tmp_path / "run").prompt.values
    torch.testing.assert_close(kept[0], teacher.values[0], atol=1e-6, rtol=0)
    assert not torch.allclose(kept[1:], teacher.values[1:6], atol=1e-4)


# --- rows -------------------------------------------------------------------------------------


def test_few_shot_examples_are_made_into_tokens_and_scored(model_folder: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "d.csv", ROWS * 2, ("text", "label"))
    choice = recipe(
        model={"id": str(model_folder)}, distill={"few_shot": 90},
        data={"path": str(data), "eval_path": str(data), "template": TEMPLATE, "label": "label"},
    )  # fmt: skip
    distill(choice, tmp_path / "run")
    found = facts(tmp_path / "run")
    assert 60 < found["text_tokens"] <= 90
    scores = foreword.load(tmp_path / "run").scores
    assert {"full_text", "zero_shot", "majority"} <= set(scores["baselines"])
    assert found["agreement (distilled)"] >= found["agreement (no text)"] - 0.05


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({}, "nothing to distil"),
        ({"distill": {"text": "t.txt", "few_shot": 9}}, "exclude each other"),
        ({"distill": {"few_shot": 9}}, "need labelled rows"),
        ({"distill": {"text": "t.txt"}, "prompt": {"method": "cpt"}}, "cpt starts from rows"),
        ({"distill": {"text": "t.txt"}}, "cannot read the text"),
        ({"distill": {"text": "LONG"}, "prompt": {"placement": "end"}}, "in front of everything"),
        ({"distill": {"text": "LONG"}, "prompt": {"init": "random"}}, "starts as its text"),
        ({"distill": {"text": "LONG"}, "prompt": {"virtual_tokens": 400}}, "save nothing"),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    model_folder: Path, tmp_path: Path, text_file: Path, sections: dict[str, Any], what: str
) -> None:
    if sections.get("distill", {}).get("text") == "LONG":
        sections = {**sections, "distill": {"text": str(text_file)}}
    with pytest.raises(ForewordError, match=what):
        distill(recipe(model={"id": str(model_folder)}, **sections), tmp_path / "run")
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_a_text_longer_than_the_window_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("fox dog " * 600)
    choice = recipe(model={"id": str(model_folder)}, distill={"text": str(tmp_path / "t.txt")})
    with pytest.raises(ForewordError, match="reads 512"):
        distill(choice, tmp_path / "run")


def test_examples_come_class_by_class_and_fit() -> None:
    backbone = tiny.backbone()
    encoder = make_encoder(TASK, backbone, 0)
    table = rows_table([{"text": t, "label": y} for t, y in ROWS])
    examples = encoder.examples(table)
    found = few_shot(encoder, table, examples, 100)
    assert len(found.ids) == len(found.types) <= 100
    labels = [examples[i].label for i in found.rows]
    assert labels[:2] == [0, 1]
    assert abs(labels.count(0) - labels.count(1)) <= 1
    text = tiny.tokenizer().decode(found.ids)
    for i in found.rows:
        assert f"Tweet : {ROWS[i][0]} Label : {ROWS[i][1]}\n" in text
    assert len(few_shot(encoder, table, examples, 0).rows) == 2, "one of each class"
    with pytest.raises(ForewordError, match="no row fits"):
        few_shot(encoder, table, examples, 3)


@pytest.mark.parametrize("probabilities", [(0.7, 0.2, 0.1), (0.1, 0.2, 0.7), (0.2, 0.5, 0.3)])
def test_class_targets_are_the_marginals_of_the_words(probabilities: Sequence[float]) -> None:
    words = ((10, 11, 0), (10, 12, 0), (13, 0))
    found = class_targets((1, 2), words, np.array(probabilities))
    best = words[int(np.argmax(probabilities))]
    assert found.branches == (best,)
    for i, (ids, shares) in enumerate(found.soft):
        alike = [(w, p) for w, p in zip(words, probabilities, strict=True) if w[:i] == best[:i] and len(w) > i]
        total = sum(p for _, p in alike)
        for token, share in zip(ids, shares, strict=True):
            assert share == pytest.approx(sum(p for w, p in alike if w[i] == token) / total)


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_candidates_are_the_likeliest_tokens_of_plain_rows(layout: Any) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    text = tuple(range(20, 40))
    teacher = reading(backbone, text)
    segments = [Segment((5, 6), ((7, 8, 9),)), Segment((9, 10, 11), ((12, 0),))]
    found = candidates(backbone, teacher, segments, 4, layout)
    for segment, mine in zip(segments, found, strict=True):
        ids = torch.tensor([[*text, *segment.context, *segment.branches[0]]])
        with torch.no_grad():
            logits = backbone.model(input_ids=ids).logits[0].softmax(-1)
        at = len(text) + len(segment.context) - 1
        top = logits[at : at + len(segment.branches[0])].topk(4)
        assert torch.equal(mine.ids, top.indices)
        torch.testing.assert_close(mine.probabilities, top.values, atol=1e-5, rtol=1e-4)
    (soft, _) = softened(segments, found)
    assert [sum(p) for _, p in soft.soft] == pytest.approx([1, 1, 1])
    tops = [c.ids[:, 0].numpy() for c in found]
    assert agreement(tops, tops).tolist() == [1, 1]
    other = candidates(backbone, no_prompt(backbone), segments, 1, layout)
    assert agreement(tops, [c.ids[:, 0].numpy() for c in other]).mean() < 1


# --- several tasks ----------------------------------------------------------------------------


def task_recipe(model: Path, folder: Path, name: str, rows: list[tuple[str, str]], template: str) -> tuple[str, Recipe]:
    data = write_csv(folder / f"{name}.csv", rows, ("text", "label"))
    choice = {
        "model": {"id": str(model)},
        "data": {"path": str(data), "eval_path": str(data), "template": template, "label": "label"},
        "prompt": {"virtual_tokens": 4, "rank": 2}, "train": {"epochs": 4, "batch_size": 4, "lr": 0.01},
    }  # fmt: skip
    return name, merge(Recipe(), choice, "test")


def test_tasks_share_a_soft_prompt_and_a_new_one_starts_from_it(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = task_recipe(model_folder, tmp_path, "tweets", ROWS, TEMPLATE)
    questions = [(t, "question" if i % 3 else "praise") for i, (t, _) in enumerate(ROWS)]
    second = task_recipe(model_folder, tmp_path, "kinds", questions, "{text} Kind :")
    multitask([first, second], tmp_path / "run", resume=False)
    shared = read_adapter(tmp_path / "run")
    assert shared.config["peft_type"] == "MULTITASK_PROMPT_TUNING"
    assert shared.config["num_tasks"] == 2
    for t, name in enumerate(("tweets", "kinds")):
        folder = tmp_path / "run" / "tasks" / f"0{t}-{name}"
        mine = foreword.load(folder)
        assert {"accuracy", "baselines"} <= set(mine.scores)
        torch.testing.assert_close(mine.prompt.values, read_adapter(tmp_path / "run", task=t).prompt.values)
    with monkeypatch.context() as patch:
        patch.setattr(training, "interruptible", _after(3))
        with pytest.raises(KeyboardInterrupt):
            multitask([first, second], tmp_path / "cut", resume=False)
    multitask([first, second], tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "run" / WEIGHTS).read_bytes()
    with pytest.raises(ForewordError, match="holds 2 tasks"):
        foreword.load(tmp_path / "run")
    target = foreword.train(
        model=str(model_folder), data=[{"text": t, "label": y} for t, y in ROWS], label="label", template=TEMPLATE,
        out=tmp_path / "target", train={"lr": 1e-12, "epochs": 1},
        prompt={"method": "multitask", "virtual_tokens": 0, "init": "adapter", "init_adapter": str(tmp_path / "run")},
    )  # fmt: skip
    tensors = shared.tensors
    mean = tensors["prefix_task_cols"].mean(0) @ tensors["prefix_task_rows"].mean(0)
    torch.testing.assert_close(target.adapter.prompt.values, tensors["prompt_embeddings"] * mean, atol=1e-5, rtol=1e-4)


def test_the_tasks_of_one_pass_are_read_by_their_own_rows(model_folder: Path, tmp_path: Path) -> None:
    """Task two's rows must not move what only task one has."""
    first = task_recipe(model_folder, tmp_path, "one", ROWS, TEMPLATE)
    second = task_recipe(model_folder, tmp_path, "two", ROWS, TEMPLATE)
    multitask([first, second], tmp_path / "run", resume=False)
    cols = read_adapter(tmp_path / "run").tensors["prefix_task_cols"]
    assert not torch.allclose(cols[0], cols[1], atol=1e-4), "noise of their own and rows of their own"


def test_tasks_that_cannot_train_together_are_refused(model_folder: Path, tmp_path: Path) -> None:
    first = task_recipe(model_folder, tmp_path, "one", ROWS, TEMPLATE)
    with pytest.raises(ForewordError, match="no multitask"):
        multitask([first], tmp_path / "run", resume=False)
    with pytest.raises(ForewordError, match="same name"):
        multitask([first, first], tmp_path / "run", resume=False)
    other = ("other", merge(first[1], {"model": {"id": "x/y"}}, "test"))
    with pytest.raises(ForewordError, match="differ in model"):
        multitask([first, other], tmp_path / "run", resume=False)
