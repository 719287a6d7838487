"""Held-out rows: a fraction or k folds, stratified by label, from an explicit generator."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from foreword.errors import ForewordError


def hold_out(labels: Sequence[Hashable], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits row indices into (kept, held out); at least one row lies on each side.

    Args:
        labels: class of each row (any constant for free text).
        fraction: share of the rows held out, in (0, 1).
        seed: of the generator.
    """
    _need_two(labels)
    order = _stratified_order(labels, seed)
    count = min(max(round(len(order) * fraction), 1), len(order) - 1)
    # Every (1/fraction)-th row of the stratified order: each class gives its share.
    picked = {order[int((i + 0.5) * len(order) / count)] for i in range(count)}
    return [i for i in range(len(order)) if i not in picked], sorted(picked)


def sample(labels: Sequence[Hashable], most: int, seed: int) -> list[int]:
    """At most so many row indices, in order; of every class its share."""
    return list(range(len(labels))) if len(labels) <= most else hold_out(labels, most / len(labels), seed)[1]


def k_folds(labels: Sequence[Hashable], folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """``folds`` pairs of (training, held-out) row indices; each row is held out once."""
    _need_two(labels)
    order = _stratified_order(labels, seed)
    held = [sorted(order[f::folds]) for f in range(folds)]
    return [(sorted(set(order) - set(h)), h) for h in held]


def _stratified_order(labels: Sequence[Hashable], seed: int) -> list[int]:
    """Row indices shuffled inside each class, classes one after the other."""
    rng = np.random.Generator(np.random.PCG64(seed))
    order = rng.permutation(len(labels)).tolist()
    first_seen = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return sorted(order, key=lambda i: first_seen[labels[i]])


def _need_two(labels: Sequence[Hashable]) -> None:
    if len(labels) < 2:
        raise ForewordError(
            f"{len(labels)} row is too few to hold any out",
            "keys data.eval_fraction, data.validation_fraction, data.folds",
            "give more rows, or leave these keys out",
        )
