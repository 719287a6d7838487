"""Biases of classes: fitted right, each row's without it, and added wherever classes are compared."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foreword
from conftest import ROWS, Cli
from foreword.artifact.ensemble import write_ensemble
from foreword.artifact.sidecar import SIDECAR
from foreword.evaluation.biases import (
    PARTS,
    PLAIN,
    TRAINED,
    class_biases,
    cross_biased,
    fitted_biases,
    helpful,
    says_shares,
)
from foreword.evaluation.evaluate import Outcome
from foreword.evaluation.scoring import rebalanced, softmax
from foreword.tuning.ensemble import log_loss

DATA = [{"text": text, "label": label} for text, label in ROWS]
BIASES = [-3.25, 3.25]
Table = np.ndarray[Any, np.dtype[np.float64]]


def tables(seed: int, rows: int, classes: int, width: float = 2.0) -> tuple[Table, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, width, (rows, classes)), rng.integers(0, classes, rows).tolist()


def outcome(scores: Table, labels: list[int]) -> Outcome:
    return Outcome(labels, [1] * len(labels), [0.0] * len(labels), softmax(scores))


def powers(labels: list[int], balance: float) -> Table:
    """Weights of rows, 1 on average, as the power of their class's number of rows says."""
    each = np.array([labels.count(label) ** -balance for label in labels])
    return each / each.mean()


# --- fitting ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 8), st.sampled_from([TRAINED, PLAIN]),
    st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_they_are_where_torch_finds_the_posterior_highest(
    seed: int, rows: int, classes: int, width: float, balance: float
) -> None:
    scores, labels = tables(seed, rows, classes)
    found = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    offsets, truth, weights = torch.from_numpy(scores), torch.tensor(labels), powers(labels, balance)
    search = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Any:
        search.zero_grad()
        each = torch.nn.functional.cross_entropy(offsets + found, truth, reduction="none")
        lost = each @ torch.from_numpy(weights) + found.square().sum() / (2 * width**2)
        lost.backward()
        return lost

    search.step(loss)
    np.testing.assert_allclose(fitted_biases(scores, labels, width, balance), found.detach().numpy(), atol=0.02)


@given(st.integers(0, 10_000), st.integers(20, 60), st.integers(2, 6))
def test_with_a_wide_prior_a_class_is_predicted_as_often_as_it_comes(seed: int, rows: int, classes: int) -> None:
    scores, labels = tables(seed, rows, classes)
    found = softmax(scores + fitted_biases(scores, labels, 1000.0)).mean(0)
    np.testing.assert_allclose(found, np.bincount(labels, minlength=classes) / rows, atol=0.03)


@given(st.integers(0, 10_000), st.integers(20, 60), st.integers(2, 6))
def test_balanced_a_class_is_predicted_as_often_as_if_every_class_had_as_many_rows(
    seed: int, rows: int, classes: int
) -> None:
    scores, labels = tables(seed, rows, classes)
    labels[:classes] = range(classes)
    said = softmax(scores + fitted_biases(scores, labels, 1000.0, 1.0))
    by_class = [said[np.array(labels) == c].mean(0) for c in range(classes)]
    np.testing.assert_allclose(np.mean(by_class, axis=0), 1 / classes, atol=0.03)


def test_without_rows_there_is_no_bias() -> None:
    assert fitted_biases(np.zeros((0, 3)), []).tolist() == [0, 0, 0]


def test_a_shift_of_a_class_is_found_and_taken_back() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (4000, 3))
    labels = [int(rng.choice(3, p=p)) for p in softmax(scores)]
    found = fitted_biases(scores + np.array([2.0, -1.0, -1.0]), labels)
    np.testing.assert_allclose(found, [-2, 1, 1], atol=0.15)


def test_probabilities_that_are_nothing_stay_finite() -> None:
    sure = Outcome([0, 1], [1, 1], [0.0, 0.0], np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert np.isfinite(class_biases(sure)).all()
    assert np.isfinite(cross_biased(sure).probabilities).all()  # type: ignore[call-overload]
    assert rebalanced(np.array([[1.0, 0.0]]), [-100.0, 100.0]).tolist() == [[1.0, 0.0]]


@given(st.integers(0, 10_000), st.integers(5, 40), st.integers(2, 4))
def test_a_rows_biases_are_fitted_without_it(seed: int, rows: int, classes: int) -> None:
    """A row's probabilities, whatever they are, have no part in the biases that it is given."""
    scores, labels = tables(seed, rows, classes)
    other, row = scores.copy(), seed % rows
    other[row] += np.random.default_rng(seed + 1).normal(0, 5, classes)
    found, changed = (cross_biased(outcome(s, labels)).probabilities for s in (scores, other))
    assert found is not None
    assert changed is not None
    before, after = (np.log(t[row] / softmax(s)[row]) for t, s in ((found, scores), (changed, other)))
    np.testing.assert_allclose(after - after.mean(), before - before.mean(), atol=1e-8)


def test_every_part_has_its_share_of_each_class() -> None:
    """Rows that alternate between as many classes as there are parts would else be fitted without their class."""
    labels = list(range(PARTS)) * 8
    scores = np.zeros((len(labels), PARTS))
    found = cross_biased(outcome(scores, labels)).probabilities
    assert found is not None
    np.testing.assert_allclose(found, 1 / PARTS, atol=0.02)


def test_equal_numbers_of_rows_do_not_say_how_often_a_class_comes() -> None:
    assert not says_shares([16] * 6)
    assert not says_shares([25, 24, 25])
    assert says_shares([17, 33])


def test_they_help_whoever_leans_to_a_class_and_nobody_who_does_not() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (60, 2))
    labels = [int(rng.choice(2, p=p)) for p in softmax(scores)]
    assert helpful(outcome(scores + np.array([3.0, 0.0]), labels))
    assert not helpful(outcome(scores, labels))
    assert not helpful(outcome(scores[:1] + np.array([3.0, 0.0]), labels[:1]))
    assert not helpful(Outcome([], [2], [-1.0]))


def test_who_counts_classes_the_same_wants_others_than_who_counts_rows() -> None:
    """Nothing is known of any row: by the rows the commoner class is likelier, by the classes none is."""
    ignorant = outcome(np.zeros((60, 2)), [0] * 6 + [1] * 54)
    assert helpful(ignorant)
    assert not helpful(ignorant, 1.0)
    assert class_biases(ignorant, balance=1.0) == pytest.approx((0, 0), abs=1e-6)
    low, lower = (class_biases(ignorant, balance=b)[0] for b in (0.5, 0.0))
    assert lower < low < 0


def test_free_text_has_none() -> None:
    free = Outcome([], [2], [-1.0])
    assert class_biases(free) == ()
    assert cross_biased(free) is free
    assert free.rebalanced([1.0]) is free


# --- use ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run without biases and the same with."""
    folder = tmp_path_factory.mktemp("biased")
    foreword.train(
        model=str(model_folder), data=DATA, text="text", label="label", out=folder / "plain", quiet=True,
        prompt={"virtual_tokens": 3}, train={"epochs": 1},
    )  # fmt: skip
    shutil.copytree(folder / "plain", folder / "biased")
    write_biases(folder / "biased", BIASES)
    return folder / "plain", folder / "biased"


def write_biases(run: Path, biases: list[float]) -> None:
    stored = json.loads((run / SIDECAR).read_text())
    stored["task"]["biases"] = biases
    (run / SIDECAR).write_text(json.dumps(stored))


def probabilities(task: Any) -> Table:
    return np.array([list(p.probabilities.values()) for p in task.predict([r["text"] for r in DATA])])


def shifted(table: Table) -> Table:
    return softmax(np.log(table) + np.array(BIASES))


def test_predictions_and_scores_have_them_and_the_baseline_has_not(runs: tuple[Path, Path]) -> None:
    plain, biased = map(foreword.load, runs)
    expected = shifted(probabilities(plain))
    np.testing.assert_allclose(probabilities(biased), expected, atol=1e-9)
    assert not np.array_equal(expected.argmax(1), probabilities(plain).argmax(1))
    scores, before = biased.evaluate(DATA), plain.evaluate(DATA)
    classes = biased.task.classes
    right = [classes[i] == r["label"] for i, r in zip(expected.argmax(1), DATA, strict=True)]
    assert scores["accuracy"] == pytest.approx(np.mean(right))
    assert scores["baselines"]["zero_shot"] == before["baselines"]["zero_shot"]
    assert scores["loss"] == before["loss"]


def test_members_that_differ_in_them_alone_share_passes_and_keep_their_own(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    write_ensemble(tmp_path / "both", runs)
    both = foreword.load(tmp_path / "both")
    assert isinstance(both, foreword.Ensemble)
    table = probabilities(foreword.load(runs[0]))
    np.testing.assert_allclose(probabilities(both), (table + shifted(table)) / 2, atol=1e-6)
    assert len(both._alike()) == 1
    right = both.evaluate(DATA)["accuracy"]
    said = [both.task.classes[i] == r["label"] for i, r in zip(probabilities(both).argmax(1), DATA, strict=True)]
    assert right == pytest.approx(np.mean(said))


def test_another_question_leaves_them_out(runs: tuple[Path, Path]) -> None:
    assert foreword.load(runs[1]).task.biases == tuple(BIASES)
    assert foreword.load(runs[1], template="{text} :").task.biases == ()
    assert foreword.load(runs[1], label_words={"complaint": "late", "no complaint": "quick"}).task.biases == ()


def test_the_terminal_and_the_card_tell_of_them(runs: tuple[Path, Path], cli: Cli) -> None:
    assert "-3.25, +3.25" in cli("show", runs[1])[1]
    assert "class bias" not in cli("show", runs[0])[1]


# --- tune ---------------------------------------------------------------------------------------


UNEVEN = [
    *(r for r in DATA if r["label"] == "complaint"),
    *({"text": f"{r['text']} {w}", "label": r["label"]} for r in DATA if "no" in r["label"] for w in ("fox", "dog")),
]
"""Five complaints and ten that are none, while the tiny model leans to complaints."""


def tuned(model: Path, out: Path, data: list[dict[str, str]] = UNEVEN, **tune: Any) -> Any:
    small = {
        "minutes": 0, "trainings": 6, "members": 2, "folds": 2, "virtual_tokens": (4,), "wording": "given",
        "untrained": "never",
    }  # fmt: skip
    return foreword.tune(
        model=str(model), data=data, eval_data=DATA[:7], text="text", label="label", out=out, quiet=True,
        tune=small | tune, train={"epochs": 1, "batch_size": 8},
    )  # fmt: skip


@pytest.mark.parametrize("balance", [0.0, 0.25])
def test_tune_fits_them_on_rows_left_out(model_folder: Path, tmp_path: Path, balance: float) -> None:
    made = tuned(model_folder, tmp_path / "run", balance=balance)
    assert made.scores["accuracy"] == made.evaluate(DATA[:7])["accuracy"]
    first, second = (kept_outcomes(tmp_path / "run" / "search", fold) for fold in ("fold-1", "fold-2"))
    possible = set()
    for a, b in itertools.product(first, second):
        table = np.log(np.array(a["probabilities"] + b["probabilities"]))
        possible.add(tuple(np.round(fitted_biases(table, a["truth"] + b["truth"], balance=balance), 9)))
    for number, member in enumerate(made.members):
        biases = member.task.biases
        assert any(abs(b) > 1e-6 for b in biases)
        assert tuple(np.round(biases, 9)) in possible
        card = (tmp_path / "run" / "members" / f"{number:02}" / "README.md").read_text()
        assert f"| {biases[0]:+.3f} |" in card


def kept_outcomes(search: Path, fold: str) -> list[dict[str, Any]]:
    return [o for f in search.glob(f"rung-*/*/{fold}/*/done.json") for o in json.loads(f.read_text())["outcomes"]]


@pytest.mark.parametrize(("data", "biases"), [(DATA, "auto"), (UNEVEN, "never")])
def test_there_are_none_for_rows_drawn_class_by_class_or_where_nobody_wants_them(
    data: list[dict[str, str]], biases: str, model_folder: Path, tmp_path: Path
) -> None:
    made = tuned(model_folder, tmp_path / "run", data, biases=biases, balance=0.0)
    assert {m.task.biases for m in made.members} == {()}
    trials = json.loads((tmp_path / "run" / "tune.json").read_text())["trials"]
    losses = [
        log_loss(o["truth"], np.array(o["probabilities"])) for o in kept_outcomes(tmp_path / "run" / "search", "fold-1")
    ]
    assert {round(t["loss"], 9) for t in trials if t["rung"] == 0} == {round(x, 9) for x in losses}
