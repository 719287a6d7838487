"""Scores against scikit-learn and plain loops; what intervals promise."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom
from sklearn import metrics as sk

from foreword.evaluation.intervals import Floats, Ints, for_new_rows, interval
from foreword.evaluation.metrics import (
    BINS,
    accuracy,
    calibration_error,
    classification_scores,
    confusion_matrix,
    macro_f1,
    precision_recall_f1,
    share_interval,
    token_loss,
)

thorough = settings(max_examples=100, deadline=None)


@st.composite
def outcomes(draw: st.DrawFn) -> tuple[Ints, Floats]:
    """True classes ``[n]`` and probabilities ``[n, C]``; some classes may never occur."""
    n, classes = draw(st.integers(1, 30)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weights = rng.random((n, classes)) ** draw(st.sampled_from([0.1, 1, 20]))
    return rng.integers(0, draw(st.integers(1, classes)), n), weights / weights.sum(1, keepdims=True)


@thorough
@given(outcomes())
def test_figures_are_those_of_scikit_learn(outcome: tuple[Ints, Floats]) -> None:
    truth, probabilities = outcome
    predicted, classes = probabilities.argmax(1), list(range(probabilities.shape[1]))
    confusion = confusion_matrix(truth, predicted, len(classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of single classes
        np.testing.assert_array_equal(confusion, sk.confusion_matrix(truth, predicted, labels=classes))
    assert accuracy(confusion) == pytest.approx(sk.accuracy_score(truth, predicted))
    assert macro_f1(confusion) == pytest.approx(sk.f1_score(truth, predicted, average="macro", zero_division=0))
    expected = sk.precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0)
    np.testing.assert_allclose(precision_recall_f1(confusion).T, expected[:3])


@thorough
@given(outcomes())
def test_calibration_error_is_the_plain_sum_over_bins(outcome: tuple[Ints, Floats]) -> None:
    truth, probabilities = outcome
    total = 0.0
    for b in range(BINS):
        inside = [
            (row.max(), row.argmax() == t)
            for row, t in zip(probabilities, truth, strict=True)
            if b <= row.max() * BINS < b + 1 or (b == BINS - 1 and row.max() == 1)
        ]
        if inside:
            confidence, correct = np.mean([c for c, _ in inside]), np.mean([r for _, r in inside])
            total += len(inside) / len(truth) * abs(confidence - correct)
    assert calibration_error(truth, probabilities) == pytest.approx(total)


def test_calibration_of_the_certain_and_of_the_honest() -> None:
    certain = np.eye(2)[[0] * 10]
    assert calibration_error(np.zeros(10, int), certain) == 0
    assert calibration_error(np.ones(10, int), certain) == 1
    honest = np.tile([0.7, 0.3], (10, 1))
    assert calibration_error(np.array([0] * 7 + [1] * 3), honest) == pytest.approx(0)


def example_scores() -> tuple[Ints, Floats, dict[str, object]]:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 80)
    weights = rng.random((80, 3)) + 0.6 * np.eye(3)[truth]
    probabilities = weights / weights.sum(1, keepdims=True)
    return truth, probabilities, classification_scores(truth.tolist(), probabilities, ["a", "b", "c"])


def test_the_report_holds_every_figure_under_its_class() -> None:
    truth, probabilities, scores = example_scores()
    predicted = probabilities.argmax(1)
    expected = sk.classification_report(truth, predicted, target_names=["a", "b", "c"], output_dict=True)
    assert scores["n"] == 80
    assert scores["accuracy"] == pytest.approx(expected["accuracy"])
    assert scores["macro_f1"] == pytest.approx(expected["macro avg"]["f1-score"])
    confusion = scores["confusion"]
    assert confusion["classes"] == ["a", "b", "c"]
    assert confusion["counts"] == sk.confusion_matrix(truth, predicted).tolist()
    low, counts, high = (np.asarray(confusion[k]) for k in ("low", "counts", "high"))
    assert ((low <= counts) & (counts <= high)).all()
    for name in "abc":
        found = scores["per_class"][name]
        wanted = [expected[name][k] for k in ("support", "precision", "recall", "f1-score")]
        assert [found[k] for k in ("n", "precision", "recall", "f1")] == pytest.approx(wanted)


def test_intervals_hold_their_estimate_and_repeat() -> None:
    _, _, scores = example_scores()
    assert scores == example_scores()[2]
    pairs = [(scores[k], scores["intervals"][k]) for k in ("accuracy", "macro_f1", "calibration_error")]
    pairs += [(c[k], c["intervals"][k]) for c in scores["per_class"].values() for k in ("precision", "recall", "f1")]
    assert all(0 <= low <= value <= high <= 1 and low < high for value, (low, high) in pairs)


def table_scores(confusion: Ints) -> dict[str, Any]:
    """Scores of rows with this confusion table ``[C, C]``."""
    cells = [(t, p) for (t, p), n in np.ndenumerate(confusion) for _ in range(n)]
    certain = np.eye(len(confusion))[[p for _, p in cells]]
    return classification_scores([t for t, _ in cells], certain, [f"c{i}" for i in range(len(confusion))])


@pytest.mark.parametrize(("right", "wrong"), [(32, 0), (31, 1), (0, 5), (16, 16), (290, 10)])
def test_the_interval_of_accuracy_reaches_as_far_as_jeffreys(right: int, wrong: int) -> None:
    """And as far as the bootstrap's, whose resamples are binomial."""
    n = right + wrong
    low, high = table_scores(np.array([[right, wrong], [0, 0]]))["intervals"]["accuracy"]
    tail = np.array([0.025, 0.975])
    jeffreys = beta.ppf(tail, right + 0.5, wrong + 0.5)
    resampled = binom.ppf(tail, n, right / n) / n
    assert low == pytest.approx(min(jeffreys[0], resampled[0]), abs=0.02)
    assert high == pytest.approx(max(jeffreys[1], resampled[1], right / n), abs=0.02)
    assert share_interval(np.arange(n) < right) == [low, high]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Where nearly all is right the bootstrap alone holds it in fewer than 70 of 100 draws."""
    true = np.array([[0.585, 0.015], [0.01, 0.39]])
    accuracy_, f1 = float(true.trace()), float(precision_recall_f1(true)[:, 2].mean())
    rng, held, resampled = np.random.default_rng(3), np.zeros(2), 0
    for _ in range(200):
        confusion = rng.multinomial(32, true.ravel()).reshape(2, 2)
        found = table_scores(confusion)["intervals"]
        held += [low <= v <= high for v, (low, high) in ((accuracy_, found["accuracy"]), (f1, found["macro_f1"]))]
        low, high = binom.ppf([0.025, 0.975], 32, confusion.trace() / 32) / 32
        resampled += low <= accuracy_ <= high
    assert resampled < 140
    assert (held >= 186).all(), held


def test_a_table_that_is_all_right_promises_no_certainty() -> None:
    """Of many classes neither; a class that never occurs takes no part."""
    confusion = np.diag([9, 8, 8, 7, 0])
    scores = table_scores(confusion)
    for key in ("accuracy", "macro_f1"):
        low, high = scores["intervals"][key]
        assert 0.8 < low < 0.96, key
        assert scores[key] == high == 1
    assert all(c["intervals"]["f1"][0] < 0.99 for c in scores["per_class"].values())


def test_intervals_for_new_rows_are_those_of_dependent_folds() -> None:
    """Three folds: 1/3 + 1/2 of the folds' variance instead of 1/3; nothing beyond what a score can be."""
    found = for_new_rows(
        {"accuracy": 0.8, "macro_f1": 0.99, "loss": 0.2, "n": 30,
         "intervals": {"accuracy": [0.7, 0.85], "macro_f1": [0.95, 1.0], "loss": [0.1, 1.2]}}, 3,
    )  # fmt: skip
    by = ((1 / 3 + 1 / 2) / (1 / 3)) ** 0.5
    assert found["intervals"]["accuracy"] == pytest.approx([0.8 - by * 0.1, 0.8 + by * 0.05])
    assert found["intervals"]["macro_f1"] == pytest.approx([0.99 - by * 0.04, 1.0])
    assert found["intervals"]["loss"] == pytest.approx([0.2 - by * 0.1, 0.2 + by])
    assert {k: v for k, v in found.items() if k != "intervals"} == {
        "accuracy": 0.8, "macro_f1": 0.99, "loss": 0.2, "n": 30,
    }  # fmt: skip


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = interval(400, lambda i: float(values[i].mean()))
    assert low == pytest.approx(values.mean() - 1.96 * 2 / 20, abs=0.03)
    assert high == pytest.approx(values.mean() + 1.96 * 2 / 20, abs=0.03)
    assert interval(400, lambda i: float(values[i].mean()), seed=1) != [low, high]


def test_a_class_without_rows_does_not_spoil_the_scores() -> None:
    scores = classification_scores([0, 1], np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]), ["a", "b", "c"])
    assert scores["accuracy"] == scores["macro_f1"] == 1
    assert scores["per_class"]["c"] == {
        "n": 0, "precision": 0, "recall": 0, "f1": 0,
        "intervals": {"precision": [0, 0], "recall": [0, 0], "f1": [0, 0]},
    }  # fmt: skip


@thorough
@given(st.lists(st.tuples(st.floats(-50, 0), st.integers(1, 20)), min_size=1, max_size=20))
def test_loss_is_a_mean_over_tokens(rows: list[tuple[float, int]]) -> None:
    logprobs, tokens = [p for p, _ in rows], [n for _, n in rows]
    per_token = [-p / n for p, n in rows for _ in range(n)]
    found = token_loss(logprobs, tokens)
    assert found["loss"] == pytest.approx(np.mean(per_token), abs=1e-12)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(per_token)))
    low, high = found["intervals"]["loss"]
    assert low - 1e-9 <= high


def test_a_long_row_weighs_more_than_a_short_one() -> None:
    assert token_loss([-1.0, -27.0], [1, 9])["loss"] == 2.8  # the mean of rows would be 2
    low, high = token_loss([-1.0, -27.0] * 20, [1, 9] * 20)["intervals"]["loss"]
    assert 1 < low < 2.8 < high < 3


def test_a_hopeless_loss_has_a_finite_perplexity() -> None:
    assert np.isfinite(token_loss([-1e6], [1])["perplexity"])
