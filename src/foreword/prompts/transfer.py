"""A soft prompt carried to another model (Lester et al. 2022, "Reducing Retraining by Recycling Parameter-Efficient
Prompts", arXiv 2208.05577): a linear map between the embeddings of tokens that both models know, applied to its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from foreword.errors import ForewordError
from foreword.prompts.initialisers import FREQUENT, frequent_ids
from foreword.prompts.soft import SoftPrompt

LEAST = 2
"""Shared tokens for each dimension of the source's embedding below which a map is a guess."""
PLENTY = 4
"""As many are taken where there are so many, and 5,000 where these are more."""
FOLD = 10
"""Of so many tokens one is held out for R^2, and one more chooses the ridge."""
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried, in units of the mean square of the source's embeddings' coordinates."""


@dataclass(frozen=True)
class Map:
    """``matrix`` ``[H1, H2]``: from the source's embeddings to the target's, with what it was fitted on."""

    matrix: torch.Tensor
    tokens: int
    """Shared tokens it was fitted on."""
    held_out: int
    """Shared tokens it was not fitted on."""
    r2: float
    """Share of the variance of the target's embeddings that it explains on those: 1 for all, 0 for none."""
    ridge: float


def shared_ids(source: Mapping[str, int], target: Mapping[str, int], width: int, where: str) -> list[tuple[int, int]]:
    """Ids ``(source, target)`` of tokens that both vocabularies have: frequent words, or all where these are few.

    Args:
        source: token -> id, without special tokens and ids that have no embedding.
        target: the same of the target.
        width: of the source's embeddings, ``H1``.
        where: both models, for the error.

    Raises:
        ForewordError: they share too few tokens for a map from that width.
    """
    common = {token: i for token, i in source.items() if token in target}
    most = max(FREQUENT, PLENTY * width)
    chosen = frequent_ids(common, [], 1 + max(common.values(), default=0), most)
    if len(chosen) < PLENTY * width:
        chosen = sorted(common.values())[:most]
    if len(chosen) < LEAST * width:
        raise ForewordError(
            f"the vocabularies share {len(chosen)} tokens; a map from {width} dimensions takes {LEAST * width}",
            where,
            "transfer to a model of the same family, or train anew",
        )
    token_of = {i: token for token, i in common.items()}
    return [(i, target[token_of[i]]) for i in chosen]


def fit(source: torch.Tensor, target: torch.Tensor) -> Map:
    """The ridge regression from embeddings ``[n, H1]`` to embeddings ``[n, H2]`` of the same tokens, row by row.

    Every tenth token is held out for R^2; another tenth chooses the ridge, and is fitted on in the end.
    """
    x, y = source.double(), target.double()
    turn = torch.arange(len(x)) % FOLD
    held, chooses = turn == FOLD - 1, turn == FOLD - 2
    rest = ~held & ~chooses
    errors = {r: float((x[chooses] @ _ridge(x[rest], y[rest], r) - y[chooses]).square().sum()) for r in RIDGES}
    ridge = min(errors, key=lambda r: errors[r])
    matrix = _ridge(x[~held], y[~held], ridge)
    left = (x[held] @ matrix - y[held]).square().sum()
    spread = (y[held] - y[held].mean(0)).square().sum()
    return Map(matrix.float(), int((~held).sum()), int(held.sum()), float(1 - left / spread), ridge)


def carried(prompt: SoftPrompt, found: Map) -> SoftPrompt:
    """The soft prompt's rows ``[P, H1]`` as rows of the target ``[P, H2]``.

    Their norms are as the map makes them. It shortens what it cannot predict (real tokens by 1.43 between two tiny
    models trained apart, R^2 0.45), but lengthening the rows by as much changed the loss by less than 0.003.
    """
    refuse_prefix(prompt, "the soft prompt to transfer")
    return SoftPrompt(prompt.values.float() @ found.matrix)


def refuse_prefix(prompt: SoftPrompt, where: str) -> None:
    """Refuses keys and values: no map between embeddings leads from one model's layers to another's."""
    if prompt.kind == "prefix":
        raise ForewordError(
            "keys and values are those of one model's layers and mean nothing to another",
            where,
            "transfer the rows they were compiled from, or train anew",
        )


def _ridge(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """``argmin_W |x W - y|^2 + ridge * n * mean(x^2) * |W|^2`` in float64: ``[H1, H2]``."""
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solved: torch.Tensor = torch.linalg.solve(gram, x.T @ y)
    return solved
