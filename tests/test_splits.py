"""Held-out rows: a partition, stratified, the same for the same seed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.data.splits import hold_out, k_folds
from foreword.errors import ForewordError

LABELS = st.lists(st.sampled_from("abc"), min_size=2, max_size=60)
FRACTIONS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 2**32)
thorough = settings(max_examples=100, deadline=None)


@thorough
@given(LABELS, FRACTIONS, SEEDS)
def test_each_row_is_on_one_side_and_no_side_is_empty(labels: list[str], fraction: float, seed: int) -> None:
    keep, out = hold_out(labels, fraction, seed)
    assert sorted(keep + out) == list(range(len(labels)))
    assert keep
    assert out
    assert (keep, out) == (sorted(keep), sorted(out))
    assert abs(len(out) - fraction * len(labels)) <= 1


@thorough
@given(LABELS, FRACTIONS, SEEDS)
def test_each_class_gives_its_share_within_one_row(labels: list[str], fraction: float, seed: int) -> None:
    _, out = hold_out(labels, fraction, seed)
    share, held = len(out) / len(labels), Counter(labels[i] for i in out)
    assert all(abs(held[label] - share * count) <= 1 for label, count in Counter(labels).items())


@thorough
@given(LABELS, st.integers(2, 7), SEEDS)
def test_folds_hold_each_row_out_once_and_share_each_class(labels: list[str], folds: int, seed: int) -> None:
    folds = min(folds, len(labels))
    pairs = k_folds(labels, folds, seed)
    assert len(pairs) == folds
    assert sorted(i for _, out in pairs for i in out) == list(range(len(labels)))
    for train, out in pairs:
        assert sorted(train + out) == list(range(len(labels)))
        assert train
        assert out
        held = Counter(labels[i] for i in out)
        assert all(abs(held[label] - count / folds) <= 1 for label, count in Counter(labels).items())


def test_the_seed_decides() -> None:
    labels = list("ab" * 20)
    assert hold_out(labels, 0.3, 1) == hold_out(labels, 0.3, 1)
    assert hold_out(labels, 0.3, 1) != hold_out(labels, 0.3, 2)
    assert k_folds(labels, 4, 1) == k_folds(labels, 4, 1)
    assert k_folds(labels, 4, 1) != k_folds(labels, 4, 2)


def test_one_row_cannot_be_divided() -> None:
    with pytest.raises(ForewordError, match="too few"):
        hold_out(["a"], 0.5, 0)
    with pytest.raises(ForewordError, match="too few"):
        k_folds(["a"], 2, 0)
