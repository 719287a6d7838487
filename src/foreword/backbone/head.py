"""The LM head where targets are predicted and nowhere else, without ``V``-sized copies of all of them.

Logits of ``U`` places are ``U * V`` numbers, and cross-entropy keeps copies for its gradient: with
a vocabulary of 128,000 more than all layers' activations. The head is frozen, so a target's
gradient in its hidden state is known as soon as its logits are: both are computed chunk by chunk
and the logits forgotten (the idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from foreword.backbone.load import Backbone

CHUNK_NUMBERS = 2**24
"""Logits at a time: 64 MB in float32. A GPU takes twice that, as each chunk reads the head once."""
PROBE_IDS = (1, 2, 3, 4)


class HeadTap:
    """Takes the hidden states before the LM head, inside a ``with`` block; the head then runs on one of them.

    It is the model's own forward that runs, so whatever it does before the head is done.

    Args:
        head: the model's output embedding.
        whole: let the head run on all of them all the same.
    """

    def __init__(self, head: nn.Module, whole: bool = False) -> None:
        self.head, self.whole = head, whole
        self.hidden: torch.Tensor | None = None  # [R, N, H]
        self._handle: Any = None

    def __enter__(self) -> HeadTap:
        self._handle = self.head.register_forward_pre_hook(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()

    def _take(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.hidden = args[0]
        return args if self.whole else (args[0][:1, :1].detach(), *args[1:])

    def at(self, keep: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[U, H]`` at the places ``keep`` of the flattened rows."""
        assert self.hidden is not None
        return self.hidden.flatten(0, 1)[keep]


def target_logprobs(
    backbone: Backbone, hidden: torch.Tensor, place: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Log-probability of ``targets`` ``[M]`` in float32, predicted from ``hidden[place]`` (``hidden`` ``[U, H]``)."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        # Training has one target a place, so places and targets are chunked together.
        found: torch.Tensor = _Chunked.apply(backbone, hidden[place], targets)  # type: ignore[no-untyped-call]
        return found
    lse = torch.empty(len(hidden), device=hidden.device)
    values = torch.empty(len(targets), device=hidden.device)
    step = _chunk(backbone)
    for at in range(0, len(hidden), step):
        logits = _logits(backbone, hidden[at : at + step])
        lse[at : at + step] = logits.logsumexp(-1)
        mine = ((place >= at) & (place < at + step)).nonzero()[:, 0]
        values[mine] = logits[place[mine] - at, targets[mine]]
    return values - lse[place]


def top_at(backbone: Backbone, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens after hidden states ``[U, H]``: ids and probabilities, each ``[U, count]``."""
    step = _chunk(backbone)
    found = [_logits(backbone, hidden[at : at + step]).softmax(-1).topk(count) for at in range(0, len(hidden), step)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def place_logprobs(
    backbone: Backbone, hidden: torch.Tensor, place: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """At each place of ``hidden`` ``[U, H]`` the weighted sum ``[U]`` of its targets' log-probabilities.

    ``place``, ``targets`` and ``weights`` are ``[M]``, sorted by place; each place has at least one target.
    """
    found: torch.Tensor = _Weighted.apply(backbone, hidden, place, targets, weights)  # type: ignore[no-untyped-call]
    return found


class _Weighted(torch.autograd.Function):
    """``place_logprobs``, the gradients in ``hidden`` computed along with it."""

    @staticmethod
    def forward(
        ctx: Any, backbone: Backbone, hidden: torch.Tensor, place: torch.Tensor, targets: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """See the class."""
        values, slopes = [], []
        step = _chunk(backbone)
        for at in range(0, len(hidden), step):
            mine = ((place >= at) & (place < at + step)).nonzero()[:, 0]
            with torch.enable_grad():
                leaf = hidden[at : at + step].detach().requires_grad_()
                logprobs = _logits(backbone, leaf).log_softmax(-1)
                found = logprobs[place[mine] - at, targets[mine]] * weights[mine]
                total = found.new_zeros(len(leaf)).index_add(0, place[mine] - at, found)
                (slope,) = torch.autograd.grad(total.sum(), leaf)
            values.append(total.detach())
            slopes.append(slope)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Scales the slopes."""
        (slopes,) = ctx.saved_tensors
        return None, slopes * grads[0][:, None].to(slopes.dtype), None, None, None


class _Chunked(torch.autograd.Function):
    """Log-probabilities ``[M]``, and their gradients in ``hidden`` ``[M, H]`` computed along with them."""

    @staticmethod
    def forward(ctx: Any, backbone: Backbone, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """See the class."""
        values, slopes = [], []
        step = _chunk(backbone)
        for at in range(0, len(hidden), step):
            with torch.enable_grad():
                leaf = hidden[at : at + step].detach().requires_grad_()
                logits = _logits(backbone, leaf)
                found = logits.log_softmax(-1).gather(1, targets[at : at + step, None])[:, 0]
                (slope,) = torch.autograd.grad(found.sum(), leaf)
            values.append(found.detach())
            slopes.append(slope)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Scales the slopes."""
        (slopes,) = ctx.saved_tensors
        return None, slopes * grads[0][:, None].to(slopes.dtype), None


def knows_head(backbone: Backbone) -> bool:
    """Whether head and ``_finish`` together are what the model itself does with hidden states."""
    head = backbone.model.get_output_embeddings()
    if head is None:
        return False
    ids = torch.tensor([PROBE_IDS], device=backbone.device)
    with torch.no_grad():
        with HeadTap(head, whole=True) as tap:
            expected = backbone.model(input_ids=ids, use_cache=False).logits[0].float()
        if tap.hidden is None or tap.hidden.shape[:2] != ids.shape:
            return False
        found = _logits(backbone, tap.hidden[0])
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


def _logits(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[U, V]`` in float32."""
    found: torch.Tensor = backbone.model.get_output_embeddings()(hidden)
    return _finish(backbone.config, found.float())


def _finish(config: Any, logits: torch.Tensor) -> torch.Tensor:
    """What families do to logits after the head: Cohere multiplies, Granite divides, Gemma 2 caps."""
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def _chunk(backbone: Backbone) -> int:
    numbers = CHUNK_NUMBERS if backbone.device.type == "cpu" else 2 * CHUNK_NUMBERS
    return max(1, numbers // backbone.vocab_size)
