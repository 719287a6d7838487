"""The model as it is, as a candidate of ``foreword tune``: behind one virtual token, with a bias for each class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import foreword
from conftest import ROWS, Cli
from foreword.config import TuneConfig
from foreword.data.splits import k_folds
from foreword.evaluation.biases import PLAIN, fitted_biases
from foreword.evaluation.scoring import softmax
from foreword.jobs.wording import OTHERS
from foreword.tuning.ensemble import log_losses
from foreword.tuning.space import UNTRAINED, UNTRAINED_TEXT

DATA = [{"text": text, "label": label} for text, label in ROWS]
CLASSES = ("complaint", "no complaint")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def tuned(model: Path, out: Path, resume: bool = False, **tune: Any) -> Any:
    small = {
        "minutes": 0, "trainings": 5, "members": 3, "folds": 2, "virtual_tokens": (4,), "wording": "given",
        "methods": ("prompt-tuning",),
    }  # fmt: skip
    return foreword.tune(
        model=str(model), data=DATA, text="text", label="label", out=out, quiet=True, resume=resume,
        tune=small | tune, train={"epochs": 2, "batch_size": 4},
    )  # fmt: skip


def trials(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "tune.json").read_text())["trials"]
    return found


def said(used: Any) -> np.ndarray[Any, Any]:
    return np.array([list(p.probabilities.values()) for p in used.predict([r["text"] for r in DATA])])


def last_alone(truth: Any, tables: list[Any], count: int, *_: Any) -> list[int]:
    return [len(tables) - 1] * count


def last_two_and_first(truth: Any, tables: list[Any], count: int, *_: Any) -> list[int]:
    return [len(tables) - 1, len(tables) - 2, 0]


def last_and_first(truth: Any, tables: list[Any], count: int, *_: Any) -> list[int]:
    return [len(tables) - 1, 0, 0]


@pytest.fixture(scope="module")
def alone(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("foreword.jobs.tune.select", last_alone)
        tuned(model_folder, out)
    return out


def test_chosen_several_times_it_is_one_adapter_and_holds_one_embedding(alone: Path, model_folder: Path) -> None:
    assert not (alone / "members").exists()
    (line_end,) = AutoTokenizer.from_pretrained(model_folder)(UNTRAINED_TEXT)["input_ids"]
    embeddings = AutoModelForCausalLM.from_pretrained(model_folder).get_input_embeddings().weight
    (stored,) = load_file(alone / FILES[1]).values()
    assert torch.equal(stored, embeddings[[line_end]])
    config = json.loads((alone / FILES[0]).read_text())
    assert config["prompt_tuning_init_text"] == UNTRAINED_TEXT
    facts = json.loads((alone / "foreword.json").read_text())["training"]
    assert (facts["epochs"], facts["lr"]) == (0, 0)


def assert_plain(made: Any, model_folder: Path) -> None:
    """Its probabilities are those of a plain forward pass over the line end, the text and each class's words."""
    task = made.task
    assert len(task.biases) == 2
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    for row in DATA[:3]:
        scores = []
        for words in task.words:
            before = tokenizer(UNTRAINED_TEXT + task.template.format(text=row["text"]))["input_ids"]
            target = tokenizer(f" {words}")["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([[*before, *target]])).logits[0].double().log_softmax(-1)
            at = range(len(before) - 1, len(before) - 1 + len(target))
            scores.append(float(sum(logprobs[i, t] for i, t in zip(at, target, strict=True))))
        (found,) = made.predict([row["text"]])
        wanted = softmax(np.array([scores]) + np.array(task.biases))[0]
        assert list(found.probabilities.values()) == pytest.approx(wanted.tolist(), abs=1e-6)


def test_it_says_what_the_plain_model_says_with_biases(alone: Path, model_folder: Path) -> None:
    made = foreword.load(alone)
    assert (made.task.template, made.task.words) == ("{text} Label :", CLASSES)
    assert_plain(made, model_folder)


def test_it_may_be_a_member_in_several_wordings(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreword.jobs.tune.select", last_two_and_first)
    made = tuned(model_folder, tmp_path / "run", wording="auto")
    decided = json.loads((tmp_path / "run" / "search" / "wording.json").read_text())["wordings"]
    keys = [(w["template"], tuple(w["words"])) for w in decided]
    assert len(set(keys)) == len(keys) == 1 + OTHERS
    asked = [t for t in trials(tmp_path / "run") if t["method"] == "untrained"]
    assert [(t["template"], tuple(t["words"])) for t in asked[1:]] == keys[1:]
    assert [(m.task.template, m.task.words) for m in made.members] == [keys[-1], keys[-2], keys[0]]
    for member in made.members[:2]:
        assert_plain(member, model_folder)
    assert said(made) == pytest.approx(np.mean([said(m) for m in made.members], axis=0))
    scores = made.evaluate(DATA)
    right = np.array([CLASSES.index(r["label"]) for r in DATA]) == said(made).argmax(1)
    assert scores["accuracy"] == pytest.approx(right.mean())


def test_a_folds_rows_have_the_biases_of_its_other_rows(alone: Path) -> None:
    made = foreword.load(alone)
    plain = np.log(said(made)) - np.array(made.task.biases)
    truth, balance = np.array([CLASSES.index(r["label"]) for r in DATA]), TuneConfig().balance
    assert made.task.biases == pytest.approx(fitted_biases(plain, truth.tolist(), PLAIN, balance), abs=1e-4)
    losses = []
    for keep, out in k_folds([r["label"] for r in DATA], 2, 0):
        biases = fitted_biases(plain[keep], truth[keep].tolist(), PLAIN, balance)
        losses += log_losses(truth[out].tolist(), softmax(plain[out] + biases)).tolist()
    assert trials(alone)[-1]["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


def test_people_are_told_that_nothing_was_trained(alone: Path, cli: Cli) -> None:
    assert "training     none: 10 rows chose wording and biases" in cli("show", alone)[1]
    assert "the model as it is, not trained" in (alone / "README.md").read_text()
    assert "untrained" in (alone / "report.html").read_text()


def test_its_trial_is_the_last_and_costs_the_search_nothing(alone: Path, model_folder: Path, tmp_path: Path) -> None:
    tuned(model_folder, tmp_path / "run", untrained="never")
    *others, last = trials(alone)
    assert (last["method"], last["epochs"], last["folds"]) == ("untrained", 0, 2)
    strip = {"seconds": 0}
    assert [t | strip for t in others] == [t | strip for t in trials(tmp_path / "run")]


def test_in_an_ensemble_it_is_a_member_like_others_and_a_resumed_search_makes_the_same(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foreword.jobs.tune.select", last_and_first)
    made = tuned(model_folder, tmp_path / "whole")
    names = json.loads((tmp_path / "whole" / "tune.json").read_text())["members"]
    assert names[0] == str(UNTRAINED)
    assert len(names) == 3
    assert [m.prompt.tokens for m in made.members] == [1, 4, 4]
    assert said(made) == pytest.approx(np.mean([said(m) for m in made.members], axis=0))
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("foreword.jobs.tune.write_tuned", interrupt)
        tuned(model_folder, stopped)
    shutil.rmtree(stopped / "search" / "members")
    tuned(model_folder, stopped, resume=True)
    for number in ("00", "01", "02"):
        for file in FILES:
            whole, again = (run / "members" / number / file for run in (tmp_path / "whole", stopped))
            assert whole.read_bytes() == again.read_bytes()


def test_it_takes_the_place_of_no_trained_member(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alternating(truth: Any, tables: list[Any], count: int, balance: float, trained: list[bool]) -> list[int]:
        assert (trained[0], trained[-1]) == (True, False)
        return [(len(tables) - 1) * (i % 2) for i in range(count)]

    monkeypatch.setattr("foreword.jobs.tune.select", alternating)
    tuned(model_folder, tmp_path / "run", members=8)
    affordable = json.loads((tmp_path / "run" / "search" / "members.json").read_text())["count"]
    assert 1 <= affordable < 4
    names = json.loads((tmp_path / "run" / "tune.json").read_text())["members"]
    assert names.count(str(UNTRAINED)) == len(names) - affordable == affordable


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["unwanted", "at the end", "placed"])
def test_it_is_no_candidate_where_it_is_unwanted_or_the_virtual_tokens_have_a_place(
    how: str, model_folder: Path, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {
        "unwanted": {"tune": {"untrained": "never"}, "text": "text"},
        "at the end": {"prompt": {"placement": "end"}, "text": "text"},
        "placed": {"template": "{text} {soft:4} Label :"},
    }[how]
    small = {"minutes": 0, "trainings": 4, "members": 1, "folds": 2, "virtual_tokens": (4,),
             "methods": ("prompt-tuning",), "wording": "given"}  # fmt: skip
    foreword.tune(
        model=str(model_folder), data=DATA, label="label", out=tmp_path / "run", quiet=True, train={"epochs": 1},
        **{**recipe, "tune": small | recipe.get("tune", {})},
    )  # fmt: skip
    assert "untrained" not in {t["method"] for t in trials(tmp_path / "run")}
