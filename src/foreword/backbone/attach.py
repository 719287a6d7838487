"""A soft prompt given to a backbone, whatever its kind, inside a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from foreword.backbone.forward import Prefix, compute_prefix
from foreword.backbone.load import Backbone
from foreword.backbone.shards import all_heads, own_heads
from foreword.backbone.virtual import VirtualTokens
from foreword.prompts.soft import Kind, SoftPrompt


@contextmanager
def attached(backbone: Backbone, prompt: SoftPrompt) -> Iterator[Prefix | None]:
    """Virtual ids are answered inside; yields the keys and values that stand before every input, if any."""
    with together(backbone, [prompt.values], prompt.kind, [0]) as prefix:
        yield prefix


@contextmanager
def together(
    backbone: Backbone, values: Sequence[torch.Tensor], kind: Kind, owners: Sequence[int] | torch.Tensor
) -> Iterator[Prefix | None]:
    """Several soft prompts of one size at once: rows of prompt ``k`` have the ids from ``V + k * P``.

    Args:
        backbone: the model.
        values: of each soft prompt ``[P, W]``.
        kind: of all.
        owners: which prefix each row of the input reads ``[R]``, or ``[0]`` for all rows.
    """
    if kind == "prefix":
        keys_values = torch.stack(list(values)).to(backbone.device, backbone.dtype)
        if len(values) > 1:
            keys_values = keys_values[torch.as_tensor(owners, device=backbone.device)]
        # Virtual ids stand where nothing is read (pads): the hook keeps them inside the vocabulary.
        with VirtualTokens(backbone.embedding, no_rows(backbone)):
            layers = own_heads(backbone.geometry.layered(keys_values), backbone.world)
            yield Prefix(tuple(layers), keys_values.shape[1])
        return
    table = torch.cat(list(values)) if len(values) > 1 else values[0]
    with VirtualTokens(backbone.embedding, table.to(backbone.device)):
        yield None


def no_rows(backbone: Backbone) -> torch.Tensor:
    """An empty table ``[0, H]``."""
    return torch.zeros(0, backbone.hidden_size, device=backbone.device)


def no_prompt(backbone: Backbone) -> SoftPrompt:
    """The empty soft prompt: the backbone zero-shot, with the template alone."""
    return SoftPrompt(no_rows(backbone))


def reading(backbone: Backbone, ids: Sequence[int]) -> SoftPrompt:
    """A text as a soft prompt: the keys and values that reading its token ids leaves."""
    with torch.no_grad():
        found = compute_prefix(backbone, ids)
    return SoftPrompt(backbone.geometry.flat(all_heads(found.layers, backbone.world)), "prefix")


def compiled(backbone: Backbone, rows: torch.Tensor) -> torch.Tensor:
    """Keys and values ``[P, W]`` of rows ``[P, H]`` that the backbone reads first of all.

    A prefix of them is the same soft prompt, without its cost at every request.
    """
    prompt = SoftPrompt(rows)
    ids = range(backbone.vocab_size, backbone.vocab_size + prompt.tokens)
    with torch.no_grad(), attached(backbone, prompt):
        found = compute_prefix(backbone, ids)
    return backbone.geometry.flat(all_heads(found.layers, backbone.world)).float().cpu()
