"""Context tuning: which rows a soft prompt shows, and that it trains on the others alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import foreword
import tiny
from conftest import ROWS
from foreword.artifact.folder import WEIGHTS, read_adapter
from foreword.backbone.attach import reading
from foreword.backbone.choose import choose_layout
from foreword.config import Member, PromptConfig, TrainConfig
from foreword.data.encode import Encoder
from foreword.data.sources import rows_table
from foreword.errors import ForewordError
from foreword.jobs.fewshot import FewShot, shown_in
from foreword.jobs.prepare import beginnings, make_encoder, settle_tokens
from foreword.jobs.training import train_in
from foreword.parallel.world import World
from foreword.records import Example, Segment, Task
from foreword.training import passes

TASK = Task("Tweet : {text} Label :", " ", "label", ("complaint", "no complaint"), ("complaint", "no complaint"))
DATA = [{"text": t, "label": y} for t, y in ROWS]
CONFIG = PromptConfig(method="context-tuning", virtual_tokens=30)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_encoder(TASK, tiny.backbone(), 30, "prefix")


@pytest.fixture(scope="module")
def examples(encoder: Encoder) -> list[Example]:
    return encoder.examples(rows_table(DATA))


@settings(deadline=None)  # the first one builds the tokenizer
@given(st.integers(1, 400), st.integers(0, 1000), st.integers(2, 10))
def test_so_many_tokens_are_shown_and_as_many_rows_by_every_seed(tokens: int, seed: int, rows: int) -> None:
    encoder = make_encoder(TASK, tiny.backbone(), 30, "prefix")
    some = encoder.examples(rows_table(DATA[:rows]))
    found, other = (shown_in(encoder, some, tokens, s) for s in (seed, seed + 1))
    assert len(found.ids) == tokens
    assert len(found.rows) == len(set(found.rows)) == len(other.rows)
    assert 1 <= len(found.rows) <= rows // 2
    if rows % 2 == 0:
        counts = Counter(some[i].label for i in found.rows)
        assert max(counts.values()) - min(counts.get(0, 0), counts.get(1, 0)) <= 1, "as many of each class"
    assert shown_in(encoder, some, tokens, seed) == found


def test_the_text_is_the_rows_as_they_are_asked_with_their_answers(encoder: Encoder, examples: list[Example]) -> None:
    long = shown_in(encoder, examples, 60, 3)
    text = tiny.tokenizer().decode(long.ids)
    whole = "".join(f"Tweet : {ROWS[i][0]} Label : {ROWS[i][1]}\n" for i in long.rows)
    assert text in whole + whole and text.endswith(f"Label : {ROWS[long.rows[-1]][1]}\n")
    assert len({shown_in(encoder, examples, 60, s).rows for s in range(8)}) > 1


def test_a_start_is_what_reading_the_text_leaves(encoder: Encoder, examples: list[Example]) -> None:
    backbone = tiny.backbone()
    members = [Member("examples", seed, 0.01) for seed in (0, 5)]
    methods, shown = beginnings(CONFIG, TASK, encoder, backbone, members, examples)
    for method, rows, seed in zip(methods, shown, (0, 5), strict=True):
        text = shown_in(encoder, examples, 30, seed)
        assert rows == text.rows
        torch.testing.assert_close(method(), reading(backbone, text.ids).values.float(), atol=1e-5, rtol=1e-4)


def test_rows_that_are_shown_are_never_trained_on(
    encoder: Encoder, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny.backbone()
    members = [Member("examples", seed, 0.01) for seed in (0, 1)]
    methods, shown = beginnings(CONFIG, TASK, encoder, backbone, members, examples)
    assert set(shown[0]) != set(shown[1])
    segments = [e.segment for e in examples]
    layout = choose_layout(backbone, methods[0].soft_prompt(), segments)
    read: list[list[list[tuple[int, ...]]]] = []
    plain = passes.Reader.read

    def spy(self: passes.Reader, batches: list[list[Segment]], *world: World) -> list[passes.Pass]:
        read.append([[(*self.opening, *s.context) for s in batch] for batch in batches])
        return plain(self, batches, *world)

    monkeypatch.setattr(passes.Reader, "read", spy)
    trained = train_in(
        tmp_path / "run", backbone, methods, members, segments, TrainConfig(epochs=2, batch_size=4, engine="eager"),
        layout, Console(quiet=True), shown=shown,
    )  # fmt: skip
    assert trained.population.plan.rows == len(examples) - len(shown[0])
    steps = [step for step in read if len(step) == 2]
    assert len(steps) == trained.population.plan.steps
    for k, mine in enumerate(shown):
        seen = Counter(context for step in steps for context in step[k])
        left = [e.context for i, e in enumerate(examples) if i not in mine]
        assert seen == Counter(left * 2), "every other row once an epoch"


def test_a_fold_shows_none_of_the_rows_it_is_scored_on(
    model_folder: Path, train_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foreword.jobs import prepare

    given_rows: list[int] = []

    def spy(encoder: Encoder, rows: list[Example], tokens: int, seed: int) -> FewShot:
        given_rows.append(len(rows))
        return shown_in(encoder, rows, tokens, seed)

    monkeypatch.setattr(prepare, "shown_in", spy)
    task = foreword.train(
        model=str(model_folder), data={"path": str(train_csv), "label": "Label", "folds": 5},
        template="Tweet : {Tweet text} Label :", out=tmp_path / "run",
        prompt={"method": "context-tuning", "virtual_tokens": 12}, train={"epochs": 1},
    )  # fmt: skip
    assert task.scores["n"] == 10
    assert given_rows.count(8) == 5


def test_a_recipe_that_says_no_length_gets_the_methods_own(model_folder: Path, tmp_path: Path) -> None:
    settled = settle_tokens(PromptConfig(method="context-tuning"), TASK, tiny.backbone())
    assert settled.virtual_tokens == tiny.backbone().window // 4
    foreword.train(
        model=str(model_folder), data=DATA, label="label", template=TASK.template, out=tmp_path / "run",
        prompt={"method": "context-tuning"}, train={"epochs": 1},
    )  # fmt: skip
    adapter = read_adapter(tmp_path / "run")
    assert adapter.config["num_virtual_tokens"] == settled.virtual_tokens
    assert adapter.sidecar is not None
    assert adapter.sidecar.training["init"] == "examples"
    assert adapter.sidecar.training["init_text"] is None


@pytest.mark.parametrize(
    ("prompt", "what"),
    [({"init": "vocabulary"}, "takes no other initialiser"), ({"placement": "end"}, "stands in the cache")],
)
def test_what_cannot_be_is_refused(model_folder: Path, tmp_path: Path, prompt: dict[str, str], what: str) -> None:
    with pytest.raises(ForewordError, match=what):
        foreword.train(
            model=str(model_folder), data=DATA, label="label", template=TASK.template, out=tmp_path / "run",
            prompt={"method": "context-tuning", **prompt}, train={"epochs": 1},
        )  # fmt: skip
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_one_row_cannot_be_shown_and_trained_on(encoder: Encoder, examples: list[Example]) -> None:
    with pytest.raises(ForewordError, match="needs two, not 1"):
        beginnings(CONFIG, TASK, encoder, tiny.backbone(), [Member("examples", 0, 0.01)], examples[:1])
