"""The wording that ``foreword tune`` chooses: learnt label words, closings, and that no row left out has
a part in what it is judged by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import foreword
import tiny
from conftest import ROWS, Cli
from foreword.config import DataConfig
from foreword.data.splits import k_folds
from foreword.data.template import parse, with_closing
from foreword.evaluation.words import LEAST_ROWS, learnt_words, next_logprobs
from foreword.jobs.candidates import Task, Workshop
from foreword.jobs.data import read_splits
from foreword.jobs.tune import _Search
from foreword.jobs.wording import CLOSINGS, Free, Judged, Wording, compared, finalists, preferred, thinned

DATA = [{"text": text, "label": label} for text, label in ROWS]
CLASSES = ("complaint", "no complaint")
BOTH = Free(closing=True, words=True)


# --- words --------------------------------------------------------------------------------------


def spoken(labels: Sequence[int], said: dict[int, int], tokens: int = 40) -> Any:
    """Log-probabilities with one token likelier behind the rows of a class than elsewhere."""
    table = np.random.default_rng(0).normal(0, 0.3, (len(labels), tokens))
    for row, label in enumerate(labels):
        table[row, said[label]] += 3
    return table - np.log(np.exp(table).sum(1, keepdims=True))


def test_a_class_is_given_the_word_that_its_rows_bring() -> None:
    labels = [0, 1, 2] * 5
    table = spoken(labels, {0: 7, 1: 30, 2: 12})
    assert learnt_words(table, labels, [0, 1, 2], lambda i: True) == [7, 30, 12]
    assert learnt_words(table, labels, [0, 1, 2], lambda i: i != 30)[1] not in (30, 7, 12)


def test_a_class_of_few_rows_keeps_its_name_and_nobody_else_takes_it() -> None:
    labels = [0, 1] * 5 + [2] * (LEAST_ROWS - 1)
    table = spoken(labels, {0: 7, 1: 30, 2: 12})
    assert learnt_words(table, labels, [5, 6, 30], lambda i: True)[2] == 30
    words = learnt_words(table, labels, [5, 6, 30], lambda i: True)
    assert len(set(words)) == 3
    few = [0] * 8 + [1]
    assert learnt_words(spoken(few, {0: 7, 1: 30}), few, [5, 6], lambda i: True) == [5, 6]


def test_the_next_tokens_are_those_of_a_plain_forward_pass() -> None:
    backbone = tiny.backbone(dtype=torch.float32)
    contexts = [(5, 6, 7), (8, 9), tuple(range(20, 40))]
    found = next_logprobs(backbone, contexts)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in contexts], batch_first=True)
    with torch.no_grad():
        logits = backbone.model(input_ids=ids).logits  # right-padded: a causal model reads no pad before
    for row, context in enumerate(contexts):
        expected = logits[row, len(context) - 1, : backbone.vocab_size].log_softmax(-1)
        np.testing.assert_allclose(found[row], expected.numpy(), atol=1e-5)


# --- choosing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["{text} Label :", "A : {a|cut}\nB : {b c|cut-start}", "{{x}} {t}{soft:3} L {{:", "{t}"]
)
def test_another_closing_leaves_the_rest(source: str) -> None:
    before, template = parse(source), parse(with_closing(source, "\nThis is {a}"))
    assert template.closing == "\nThis is {a}"
    assert template.parts[:-1] == (before.parts[:-1] if before.closing else before.parts)


def splits_of(rows: Sequence[dict[str, str]]) -> Any:
    return read_splits(DataConfig(text="text", label="label"), rows)


def folds_of(rows: Sequence[dict[str, str]]) -> list[tuple[list[int], list[int]]]:
    return k_folds([r["label"] for r in rows], 2, 0)


def test_all_closings_are_compared_with_own_and_learnt_words() -> None:
    backbone, splits = tiny.backbone(dtype=torch.float32), splits_of(DATA)
    found = compared(backbone, splits.task, splits.train, folds_of(DATA), BOTH, 0.0)
    assert len(found) == 2 * (1 + len(CLOSINGS))
    assert (found[0].wording.template, found[0].wording.words) == (splits.task.template, CLASSES)
    for judged in found:
        assert judged.losses.shape == (len(DATA),) and (judged.losses > 0).all()
        assert len(set(judged.wording.words)) == 2
    learnt = [w for j in found if j.wording.words != CLASSES for w in j.wording.words]
    assert learnt and all(w.isalpha() for w in learnt)
    alone = compared(backbone, splits.task, splits.train, folds_of(DATA), Free(closing=False, words=False), 0.0)
    assert [j.wording for j in alone] == [found[0].wording]


def test_rows_left_out_have_no_part_in_a_folds_words() -> None:
    """Other labels there change their losses and nothing else of the fold."""
    backbone, splits, folds = tiny.backbone(dtype=torch.float32), splits_of(DATA), folds_of(DATA)
    _, out = folds[0]
    other = [{**r, "label": CLASSES[r["label"] == CLASSES[0]]} if i in out else r for i, r in enumerate(DATA)]
    mine = compared(backbone, splits.task, splits.train, folds, BOTH, 0.0)
    theirs = compared(backbone, splits.task, splits_of(other).train, folds, BOTH, 0.0)
    for a, b in zip(mine, theirs, strict=True):
        assert a.wording.fold_words[0] == b.wording.fold_words[0]
        assert not np.allclose(a.losses[out], b.losses[out])


def test_rows_of_many_classes_teach_no_words() -> None:
    rows = [{"text": f"word {i}", "label": f"class {i // 2}"} for i in range(8)]
    splits = splits_of(rows)
    found = compared(tiny.backbone(dtype=torch.float32), splits.task, splits.train, folds_of(rows), BOTH, 0.0)
    assert {j.wording.words for j in found} == {splits.task.words}
    assert len(found) == 1 + len(CLOSINGS)


def judged(template: str, words: tuple[str, ...], losses: Sequence[float]) -> Judged:
    return Judged(Wording(template, words, (words,)), np.array(losses))


def test_learnt_words_are_trained_where_they_are_better_than_chance() -> None:
    task = replace(splits_of(DATA).task, template="given")
    given_one, better = judged("given", CLASSES, [1.0, 1.2, 0.9]), judged("other", CLASSES, [0.9, 1.1, 0.8])
    sure, unsure = judged("x", ("a", "b"), [0.5, 0.6, 0.4]), judged("y", ("c", "d"), [0.1, 0.1, 2.5])
    assert finalists([given_one, better], task) == [better]
    assert finalists([given_one, better, sure], task) == [better, sure]
    assert finalists([given_one, better, unsure], task) == [better]


def test_own_words_stay_unless_others_are_better_by_more_than_chance() -> None:
    own = judged("x", CLASSES, [1.0, 1.2, 0.9, 1.1])
    luck, better = (judged("x", ("a", "b"), losses) for losses in ([0.1, 1.3, 1.0, 1.2], [0.8, 1.1, 0.8, 1.0]))
    assert preferred(own, luck) is own
    assert preferred(own, better) is better
    assert preferred(own, own) is own


def test_some_rows_of_many_are_looked_at_of_every_fold_its_share() -> None:
    folds = k_folds([str(i % 2) for i in range(1000)], 4, 0)
    found = thinned(folds)
    looked = {i for _, out in found for i in out}
    assert 100 <= len(looked) <= 128
    assert {len(out) for _, out in found} == {len(looked) // 4}
    assert all(set(keep) == looked - set(out) for keep, out in found)
    assert thinned(k_folds(["a", "b"] * 20, 4, 0)) == k_folds(["a", "b"] * 20, 4, 0)


# --- in a search --------------------------------------------------------------------------------


def tuned(model: Path, out: Path, tune: dict[str, Any], **more: Any) -> Any:
    small = {"minutes": 0, "trainings": 3, "members": 1, "folds": 2, "lr_factors": (1.0,), "virtual_tokens": (2,)}
    rest = {"text": "text", "data": DATA, "label": "label", **more}
    return foreword.tune(
        model=str(model),
        out=out,
        quiet=True,
        tune={**small, "methods": ("prompt-tuning",), **tune},
        train={"epochs": 1},
        **rest,
    )


def task_of(run: Path) -> dict[str, Any]:
    task: dict[str, Any] = json.loads((run / "foreword.json").read_text())["task"]
    return task


def test_what_is_trained_and_loaded_speaks_in_the_chosen_wording(model_folder: Path, tmp_path: Path) -> None:
    made = tuned(model_folder, tmp_path / "run", {"untrained": "never"})
    decided = json.loads((tmp_path / "run" / "search" / "wording.json").read_text())["wordings"][0]
    task = task_of(tmp_path / "run")
    assert (task["template"], list(task["words"])) == (decided["template"], decided["words"])
    assert {p.label for p in made.predict([r["text"] for r in DATA])} <= set(CLASSES)


@pytest.mark.parametrize("untrained", ["auto", "never"])
def test_the_wording_that_a_trained_soft_prompt_does_better_in_is_chosen(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: str
) -> None:
    """By losses that the search then has of its first candidate, as all rows are looked at; none trains twice."""
    told: list[Judged] = []
    trainings: list[Any] = []
    trained, train = _Search._losses_in, Workshop.train

    def both(found: Sequence[Judged], task: Any) -> list[Judged]:
        return [found[0], next(j for j in found if j.wording.words != CLASSES)]

    def listening(self: _Search, name: str, wording: Wording, folds: Any) -> Any:
        losses = trained(self, name, wording, folds)
        told.append(Judged(wording, losses))
        return losses

    def noting(self: Workshop, folder: Path, task: Task) -> Any:
        trainings.extend((self.splits.task.template, task.words, one, task.keep) for one in task.group)
        return train(self, folder, task)

    monkeypatch.setattr("foreword.jobs.wording.finalists", both)
    monkeypatch.setattr(_Search, "_losses_in", listening)
    monkeypatch.setattr(Workshop, "train", noting)
    rows = [{"text": f"{r['text']} {word}", "label": r["label"]} for word in ("fox", "dog") for r in DATA]
    tuned(model_folder, tmp_path / "run", {"trainings": 6, "untrained": untrained}, data=rows)
    first, second = told
    assert first.losses.tolist() != second.losses.tolist()
    best = preferred(first, second)
    decided = json.loads((tmp_path / "run" / "search" / "wording.json").read_text())["wordings"][0]
    assert (decided["template"], tuple(decided["words"])) == best.wording.key
    assert decided["seconds"] > 0
    trials = json.loads((tmp_path / "run" / "tune.json").read_text())["trials"]
    assert min(abs(t["loss"] - best.losses.mean()) for t in trials if t["folds"] == 2) < 1e-9
    assert len(trainings) == len(set(trainings)) > 4


def test_what_somebody_wrote_stays(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    template = "Tweet : {text} It is a"
    tuned(model_folder, tmp_path / "template", {}, template=template, text=None)
    assert task_of(tmp_path / "template")["template"] == template
    tuned(model_folder, tmp_path / "all", {"wording": "given"})
    assert (task_of(tmp_path / "all")["template"], task_of(tmp_path / "all")["words"]) == (
        "{text} Label :", list(CLASSES),
    )  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in DATA))
    words = {"complaint": "you", "no complaint": "dog"}
    data = {"path": str(rows), "text": "text", "label": "label", "label_words": words}
    tuned(model_folder, tmp_path / "words", {}, data=data, text=None, label=None)
    assert task_of(tmp_path / "words")["words"] == ["you", "dog"]
    said = cli("show", tmp_path / "words")[1]
    assert "classes      complaint, no complaint\nlabel words  you, dog" in said
    assert "label words" not in cli("show", tmp_path / "all")[1]
