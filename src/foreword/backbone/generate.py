"""Generation through transformers' own ``generate``: ``[pads][soft prompt][context]``.

Pads stand before the soft prompt and position ids follow the mask, so a row's text does not
depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch

from foreword.backbone.layout import left_pad
from foreword.backbone.load import Backbone
from foreword.backbone.virtual import VirtualTokens


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. A temperature of 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


def generate(
    backbone: Backbone, table: torch.Tensor, contexts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """New token ids of each context, in order, without the end token.

    Args:
        backbone: the model.
        table: soft prompt rows ``[P, H]``; ``[0, H]`` for the plain backbone.
        contexts: token ids of the contexts, one batch.
        sampling: how tokens are chosen; sampling draws from a generator of its own seed.
    """
    with VirtualTokens(backbone.embedding, table) as virtual:
        ids, mask = left_pad([(*virtual.ids, *c) for c in contexts])
        out = _generate(backbone, ids, mask, sampling)
    return [_until(row.tolist(), backbone.end_id) for row in out[:, ids.shape[1] :]]


def stream(backbone: Backbone, table: torch.Tensor, context: Sequence[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of one context's text as they come."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(backbone.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with VirtualTokens(backbone.embedding, table) as virtual:
                ids, mask = left_pad([(*virtual.ids, *context)])
                _generate(backbone, ids, mask, sampling, streamer=streamer)
        except BaseException as e:  # handed to the reader, who would wait forever otherwise
            failure.append(e)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failure:
        raise failure[0]


class _RealIdsOnly:
    """A logits processor that never sees virtual ids (they index past the vocabulary)."""

    def __init__(self, processor: Any, base: int, stand_in: int) -> None:
        self.processor, self.base, self.stand_in = processor, base, stand_in

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.processor(ids.masked_fill(ids >= self.base, self.stand_in), scores)
        return out


def _generate(
    backbone: Backbone, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling, streamer: Any = None
) -> torch.Tensor:
    from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    sample = sampling.temperature > 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sample,
        eos_token_id=backbone.end_id,
        pad_token_id=backbone.end_id,
        **({"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k} if sample else {}),
    )
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        processors.append(_RealIdsOnly(penalty, backbone.vocab_size, backbone.end_id))
    # generate has no generator argument: its draws are fenced off from the caller's.
    with torch.no_grad(), torch.random.fork_rng(devices=_cuda_devices(backbone)):
        torch.manual_seed(sampling.seed)
        out: torch.Tensor = backbone.model.generate(
            input_ids=ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            generation_config=config,
            logits_processor=processors,
            streamer=streamer,
        )
    return out


def _cuda_devices(backbone: Backbone) -> list[torch.device]:
    return [backbone.device] if backbone.device.type == "cuda" else []


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
