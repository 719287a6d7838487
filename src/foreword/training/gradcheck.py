"""Is a gradient right? Walking along it must change the loss by as much as it says.

A quantised backbone can be differentiable by name alone: torchao's Int8DynamicActivation rounds
activations and passes no gradient through the rounding, and bitsandbytes has kernels for
inference only. A run on such a gradient ends like any other, with nothing learnt.

Plain central differences do not find that out here. In bfloat16 a step has to move the loss by a
tenth before the change stands out of the rounding, and over such a step the loss bends: on tiny
models the best of several steps still disagreed with a *right* gradient by 15 to 30 %. And as the
quotient falls steadily the longer the step, some step agrees with a gradient of half the size.
So the change of the loss is held against the gradient's integral over the whole way (three
Gauss-Legendre nodes, exact for a slope of degree five), which holds for long steps as well:

    L(x + h d) - L(x)  =  h * integral over t in [0, 1] of  d . g(x + t h d)

``d`` is the way down, along which the most is said, and then a random direction, which sees what
a gradient leaves out. ``h`` is as long as the noise of the loss demands, and that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from foreword.errors import ForewordError

Loss = Callable[[], torch.Tensor]
"""Computes a scalar loss from the parameters as they stand, without randomness of its own."""
Direction = Sequence[torch.Tensor]
"""One part for each parameter, of its shape; all parts together have norm 1."""

TOLERANCE = 0.2
"""Of the change of the loss. Right gradients stay below 0.12 in bfloat16, half or twice as large ones come to
0.2 to 0.5, zero to 1."""
NODES = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 8 / 18), (0.5 + math.sqrt(0.15), 5 / 18))
"""Places and weights of Gauss-Legendre quadrature with three nodes on [0, 1]."""
LEAST_CHANGE, MOST_CHANGE = 0.01, 0.3
"""Of the loss, by which the way down should change it: below, rounding shows; above, three nodes are too few."""
SIGNAL, DOUBT = 20.0, 5.0
"""Noises that a change should stand above, and that a disagreement is forgiven."""
LONGER = (1.0, 3.0)
"""Steps down, by how much longer they are than the noise seems to demand: its measure is off by up to 2.5 times."""
DRAWS, NEAR = 6, 1e-3
"""Places where the noise is looked for, and how far away, as a share of the parameters' norm: a third of that
leaves so many values rounded as before that the noise of 8-bit activations seems several times too small."""
FAR = (0.1, 0.03)
"""Steps in a random direction, as shares of the parameters' norm: above the noise, and where the loss bends less."""


def check_gradient(
    loss: Loss, parameters: Sequence[torch.Tensor], where: str, generator: torch.Generator, tolerance: float = TOLERANCE
) -> float:
    """Refuses a wrong gradient of the loss; returns its relative error. Takes about a dozen training steps.

    Args:
        loss: the loss of a training batch.
        parameters: what is trained, float32 or float64. Left bit for bit as they are; so is their ``.grad``.
        where: the backbone, for the message.
        generator: of the random directions, on the CPU.
        tolerance: largest relative error allowed.

    Raises:
        ForewordError: the gradient is wrong.
    """
    error = gradient_error(loss, parameters, generator)
    if error <= tolerance:
        return error
    if not math.isfinite(error):
        raise ForewordError("the loss is not a finite number", where, "model.dtype=float32, or a smaller train.lr")
    what = "it says nothing about how the loss changes" if error > 0.99 else f"the loss changes by another {error:.0%}"
    raise ForewordError(f"the gradient through the backbone is wrong: {what}", where, "model.quantize=nf4, or none")


def gradient_error(loss: Loss, parameters: Sequence[torch.Tensor], generator: torch.Generator) -> float:
    """Largest relative error of the loss's gradient, along itself and along a random direction.

    As in ``directional_error``, and not finite when the loss is not.
    """
    value, slopes = _differentiated(loss, parameters)
    steep = _norm(slopes)
    size = _norm(parameters) or 1.0
    noise = loss_noise(loss, parameters, generator)
    if not math.isfinite(value + steep + noise):
        return math.nan
    if steep * size <= DOUBT * noise:
        # Going as far as the parameters are long would not change the loss by what it changes anyhow.
        return 1.0 if noise > 0 else 0.0
    wanted = min(max(SIGNAL * noise, LEAST_CHANGE * abs(value)), MOST_CHANGE * abs(value))
    down, aside = [-s / steep for s in slopes], _random_direction(parameters, generator)
    steps = [min(times * wanted / steep, size) for times in LONGER]
    return max(
        _best_error(loss, parameters, down, steps, noise),
        _best_error(loss, parameters, aside, [far * size for far in FAR], noise),
    )


def directional_error(
    loss: Loss, parameters: Sequence[torch.Tensor], direction: Direction, step: float, noise: float = 0.0
) -> float:
    """How far the loss's change along a direction is from what its gradient says.

    Args:
        loss: see ``Loss``.
        parameters: where to start; restored afterwards.
        direction: where to go.
        step: how far.
        noise: standard deviation of one loss; ``DOUBT`` times as much is forgiven.

    Returns:
        The difference over the larger of both changes (or over ``SIGNAL`` noises, should both be smaller):
        0 is right, 0.5 a gradient of half or twice its size, 1 none at all, 2 one of the wrong sign;
        infinite when the loss on the way is no finite number.
    """
    with torch.no_grad():
        start = float(loss())
        with _moved(parameters, direction, step):
            change = float(loss()) - start
    said = step * sum(weight * _slope(loss, parameters, direction, at * step) for at, weight in NODES)
    if not math.isfinite(change + said):
        return math.inf
    larger = max(abs(change), abs(said), SIGNAL * noise)
    return max(0.0, abs(change - said) - DOUBT * noise) / larger if larger else 0.0


def _best_error(
    loss: Loss, parameters: Sequence[torch.Tensor], direction: Direction, steps: Sequence[float], noise: float
) -> float:
    """Error at the step that agrees best; stops at one that agrees."""
    best = math.inf
    for step in steps:
        best = min(best, directional_error(loss, parameters, direction, step, noise))
        if best <= TOLERANCE:
            break
    return best


def loss_noise(loss: Loss, parameters: Sequence[torch.Tensor], generator: torch.Generator) -> float:
    """Standard deviation of the loss between places so near that its gradient tells them apart exactly.

    In low precision, and where activations are rounded to 8 bits, each place rounds in its own way.
    """
    value, slopes = _differentiated(loss, parameters)
    step = NEAR * (_norm(parameters) or 1.0)
    squares = []
    for _ in range(DRAWS):
        direction = _random_direction(parameters, generator)
        with torch.no_grad(), _moved(parameters, direction, step):
            squares.append((float(loss()) - value - step * _dot(slopes, direction)) ** 2)
    return math.sqrt(sum(squares) / DRAWS)


def _slope(loss: Loss, parameters: Sequence[torch.Tensor], direction: Direction, step: float) -> float:
    """What the gradient some way along a direction says about going on in it."""
    with _moved(parameters, direction, step):
        return _dot(_differentiated(loss, parameters)[1], direction)


def _differentiated(loss: Loss, parameters: Sequence[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """The loss and its gradient, zero where the loss does not depend on a parameter."""
    with torch.enable_grad():
        value = loss()
        if not value.requires_grad:
            return float(value), [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(value, parameters, allow_unused=True)
    return float(value.detach()), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]


@contextmanager
def _moved(parameters: Sequence[torch.Tensor], direction: Direction, step: float) -> Iterator[None]:
    """Inside, the parameters stand a step along a direction; afterwards exactly where they were."""
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d, alpha=step)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)


def _random_direction(parameters: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    drawn = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    length = _norm(drawn)
    return [d / length for d in drawn]


def _norm(parts: Sequence[torch.Tensor]) -> float:
    return math.sqrt(_dot(parts, parts))


def _dot(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return sum(float((a.detach() * b.detach()).sum()) for a, b in zip(one, other, strict=True))
