"""The model card: YAML that parses, scores as stored, instructions that run, nothing of the author's machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

import foreword
import tiny
from conftest import ROWS, write_csv
from foreword.artifact.folder import TENSOR, Adapter, read_adapter
from foreword.artifact.sidecar import Sidecar
from foreword.records import Task
from foreword.report.card import model_card

HUB_BASE = "maker/tiny-llama"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("somebody of note")  # a path with a space and an " of " in it


@pytest.fixture(scope="module")
def scored(folder: Path, model_folder: Path) -> Path:
    """A classifier trained and scored on files."""
    data, held_out = write_csv(folder / "train.csv", ROWS), write_csv(folder / "test.csv", ROWS[3:])
    foreword.train(
        out=folder / "scored", model=str(model_folder), data=str(data), eval_data=str(held_out), quiet=True,
        text="Tweet text", label="Label", prompt={"virtual_tokens": 4}, train={"epochs": 1},
    )  # fmt: skip
    return folder / "scored"


@pytest.fixture(scope="module")
def unscored(folder: Path, model_folder: Path) -> Path:
    """A run that writes free text, without held-out rows."""
    rows = [{"question": text, 'the "tone"': label, "answer": f"{text} so {label}"} for text, label in ROWS]
    foreword.train(
        out=folder / "unscored", model=str(model_folder), data=rows, quiet=True, label="answer",
        template='Q {question} in {the "tone"|cut} A:', prompt={"virtual_tokens": 4, "init": "random"},
        train={"epochs": 1},
    )  # fmt: skip
    return folder / "unscored"


def card_of(run: Path) -> str:
    return (run / "README.md").read_text(encoding="utf-8")


def stored(run: Path) -> tuple[Adapter, Sidecar]:
    adapter = read_adapter(run)
    assert adapter.sidecar is not None
    return adapter, adapter.sidecar


def card_for(run: Path, base: str = HUB_BASE, **changes: Any) -> str:
    """The card the run would have on another backbone, or with other facts."""
    adapter, sidecar = stored(run)
    sidecar = replace(sidecar, backbone={**sidecar.backbone, "name": base}, **changes)
    return model_card({**adapter.config, "base_model_name_or_path": base}, sidecar)


def front_matter(card: str) -> dict[str, Any]:
    opening, front, _ = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert opening == ""
    return dict(yaml.safe_load(front))


def tables(card: str) -> list[list[str]]:
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def shown(scores: Mapping[str, Any], key: str) -> str:
    low, high = scores["intervals"][key]
    return f"{scores[key]:.3f} [{low:.3f}, {high:.3f}]"


def run_block(card: str, number: int, run: Path) -> dict[str, Any]:
    """What a Python block of the card leaves behind when it is run as a reader would."""
    code = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)[number]
    assert code.count("<this folder or repository>") == 1
    names: dict[str, Any] = {}
    exec(code.replace("<this folder or repository>", str(run)), names)
    return names


# --- a scored and an unscored run ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scored", "unscored"])
def test_the_front_matter_is_yaml_that_the_hub_knows(kind: str, request: pytest.FixtureRequest) -> None:
    front = front_matter(card_of(request.getfixturevalue(kind)))
    assert front["library_name"] == "peft"
    assert {"foreword", "soft-prompt"} <= set(front["tags"])
    assert "base_model" not in front, "a local folder is no hub id"


def test_the_base_is_named_when_it_is_a_hub_id(scored: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert front_matter(card_for(scored))["base_model"] == HUB_BASE
    (tmp_path / HUB_BASE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(card_for(scored)), "a folder that only looks like an id"


def test_scores_and_baselines_stand_there_with_their_intervals(scored: Path) -> None:
    scores, card = stored(scored)[1].scores, card_of(scored)
    expected = {
        name: [shown(s, "accuracy"), shown(s, "macro_f1")]
        for name, s in [
            ("soft prompt", scores),
            ("zero-shot", scores["baselines"]["zero_shot"]),
            ("majority class", scores["baselines"]["majority"]),
        ]
    }
    found = {row[0]: row[1:] for row in tables(card)}
    assert {name: found[name][:2] for name in expected} == expected
    assert found["soft prompt"][2] == shown(scores, "loss")
    assert f"On {scores['n']} rows: all {scores['n']} rows of test.csv" in card


def test_a_run_without_held_out_rows_says_that_it_is_not_scored(unscored: Path) -> None:
    card = card_of(unscored)
    assert "Not scored: no held-out rows were given." in card
    assert "interval" not in card


def test_template_and_label_words_are_shown(scored: Path, unscored: Path) -> None:
    assert "{Tweet text} Label : <target>" in card_of(scored)
    assert ["complaint", "`complaint`"] in tables(card_of(scored))
    assert "Q {question} in" in card_of(unscored)
    assert "label words" not in card_of(unscored)


@pytest.mark.parametrize("kind", ["scored", "unscored"])
def test_nothing_of_the_authors_machine_is_told(kind: str, folder: Path, request: pytest.FixtureRequest) -> None:
    card = card_for(request.getfixturevalue(kind))
    assert str(folder) not in card
    assert "note" not in card
    assert not re.search(r"(?<![\w.])[~.]*[/\\](?!\*)[\w.-]+[/\\]", card)


def test_facts_that_are_not_there_are_not_listed(unscored: Path) -> None:
    assert stored(unscored)[1].training["init_text"] is None
    assert "None" not in card_of(unscored)


# --- the instructions run -----------------------------------------------------------------------


def test_the_instructions_predict(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_block(card_of(scored), 0, scored)
    assert names["task"].prompt.values.equal(read_adapter(scored).prompt.values)
    assert "Prediction(label=" in capsys.readouterr().out


def test_the_instructions_write_text_with_several_columns(unscored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_block(card_of(unscored), 0, unscored)
    assert capsys.readouterr().out.startswith("[")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # transformers'
@pytest.mark.parametrize("kind", ["scored", "unscored"])
def test_the_instructions_for_peft_load_it(kind: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind)
    model = run_block(card_of(run), 1, run)["model"]
    assert type(model) is peft.PeftModelForCausalLM
    assert peft.get_peft_model_state_dict(model)[TENSOR].equal(read_adapter(run).prompt.values)


def test_the_instructions_for_peft_name_the_hub_base(scored: Path) -> None:
    assert f'from_pretrained("{HUB_BASE}")' in card_for(scored)


@pytest.mark.parametrize("base", ["smollm2-135m", "models/x.gguf"])
def test_a_base_that_transformers_cannot_load_by_name_is_resolved_for_peft(scored: Path, base: str) -> None:
    """PEFT's users get the folder of the converted file."""
    (code,) = [b for b in card_for(scored, base).split("```python\n") if "PeftModel" in b]
    assert code.startswith("from foreword.backbone.source import resolve\n")
    assert f'from_pretrained(resolve("{base}"))' in code


# --- hostile words ------------------------------------------------------------------------------


def test_markdown_in_names_stays_text(scored: Path) -> None:
    task = Task("```{text}``` Label :", " ", "label", ("a|b", "c`d"), ("x|y", "`z"))
    card = card_for(scored, task=task)
    assert "````text\n```{text}``` Label : <target>\n````\n" in card
    assert [r for r in tables(card) if len(r) == 2] == [
        ["class", "label words"],
        [r"a\|b", r"`x\|y`"],
        ["c`d", "`` `z ``"],
    ]


def test_the_size_is_that_of_the_rows(scored: Path) -> None:
    assert (
        f"4 virtual tokens (rows at the embedding, {tiny.HIDDEN} wide) for the frozen model `{HUB_BASE}`"
        in card_for(scored)
    )
    assert f"on {len(ROWS)} rows" in card_for(scored)
