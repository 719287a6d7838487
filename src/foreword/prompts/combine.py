"""One soft prompt out of several: their average, a point between two, or one after the other.

What averages of weights do for models (model soups, Wortsman et al. 2022, arXiv 2203.05482), done to prompts. Keys
turn with their position and turning is linear, so that prefixes of one size average as rows do; set behind another, a
prefix would have keys of positions that it does not stand at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from foreword.errors import ForewordError, nearest
from foreword.prompts.soft import SoftPrompt

HOW = ("average", "concatenate", "interpolate")
HALF = 0.5


def combine(
    how: str, prompts: Sequence[SoftPrompt], weight: float | None = None, names: Sequence[str] = ()
) -> SoftPrompt:
    """One soft prompt of several.

    Args:
        how: a name of ``HOW``.
        prompts: two or more, ``[P, W]`` each.
        weight: of the second against the first, for ``interpolate`` alone; None: half.
        names: of the prompts, for errors.

    Raises:
        ForewordError: no such way, a weight where it has none, or prompts that do not go together so.
    """
    if how not in HOW:
        raise ForewordError(
            f"there is no way '{how}' to combine", "--how", nearest(how, HOW) or f"known: {', '.join(HOW)}"
        )
    if weight is not None and how != "interpolate":
        raise ForewordError(f"to {how} takes no weight", f"--weight {weight:g}", "leave it out, or --how interpolate")
    if how == "average":
        return average(prompts, names)
    if how == "concatenate":
        return concatenate(prompts, names)
    return interpolate(prompts, HALF if weight is None else weight, names)


def average(prompts: Sequence[SoftPrompt], names: Sequence[str] = ()) -> SoftPrompt:
    """The mean ``[P, W]`` of prompts ``[P, W]``, value by value."""
    _go_together(prompts, names, same_tokens=True)
    values = torch.stack([p.values.double() for p in prompts]).mean(0)
    return SoftPrompt(values.to(prompts[0].values.dtype), prompts[0].kind)


def interpolate(prompts: Sequence[SoftPrompt], weight: float, names: Sequence[str] = ()) -> SoftPrompt:
    """``(1 - weight) * first + weight * second`` of two prompts ``[P, W]``: at 0 and 1 those very prompts."""
    if not (math.isfinite(weight) and 0 <= weight <= 1):
        raise ForewordError("the weight is not between 0 and 1", f"--weight {weight:g}", "0 is the first, 1 the second")
    if len(prompts) != 2:
        raise ForewordError(f"{len(prompts)} soft prompts to interpolate between", _where(names), "give two")
    _go_together(prompts, names, same_tokens=True)
    first, second = (p.values for p in prompts)
    return SoftPrompt(torch.lerp(first, second, weight), prompts[0].kind)


def concatenate(prompts: Sequence[SoftPrompt], names: Sequence[str] = ()) -> SoftPrompt:
    """The rows ``[P1 + P2 + ..., H]`` of prompts ``[Pi, H]``, one after the other."""
    _go_together(prompts, names, same_tokens=False)
    if prompts[0].kind == "prefix":
        raise ForewordError(
            "keys and values do not stand behind each other: each key is rotated to the position it was made at",
            _where(names),
            "average or interpolate them, or concatenate the rows they were compiled from",
        )
    return SoftPrompt(torch.cat([p.values for p in prompts]))


def _go_together(prompts: Sequence[SoftPrompt], names: Sequence[str], same_tokens: bool) -> None:
    """Refuses fewer than two prompts, and prompts that differ in kind, width or (if it matters) tokens."""
    where = _where(names)
    if len(prompts) < 2:
        raise ForewordError("one soft prompt alone cannot be combined", where, "give two or more")
    kinds = {p.kind for p in prompts}
    if len(kinds) > 1:
        raise ForewordError(
            "rows at the embedding and keys and values cannot be mixed", where, "foreword compile makes rows a prefix"
        )
    widths = [p.values.shape[1] for p in prompts]
    if len(set(widths)) > 1:
        raise ForewordError(
            f"the soft prompts are {_listed(widths)} wide", where, "give soft prompts of one model, or transfer one"
        )
    tokens = [p.tokens for p in prompts]
    if same_tokens and len(set(tokens)) > 1:
        raise ForewordError(
            f"the soft prompts have {_listed(tokens)} virtual tokens",
            where,
            "give soft prompts of one size, or concatenate them",
        )


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _where(names: Sequence[str]) -> str:
    return ", ".join(names) or "the soft prompts to combine"
