"""Generation through transformers' own ``generate``: ``[pads][soft prompt and context]``.

Pads stand before rows of the soft prompt and position ids follow the mask, so a row's text does
not depend on its batch. A prefix is handed over as the cache of what was read before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch

from foreword.backbone.attach import attached
from foreword.backbone.forward import Prefix
from foreword.backbone.layout import left_pad
from foreword.backbone.load import Backbone
from foreword.prompts.soft import SoftPrompt

BATCH = 16
"""Contexts that callers give to ``generate`` at once."""
COLDEST = 1e-5
"""Temperatures below this are greedy: logits over them leave float32."""


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
    backbone: Backbone, prompt: SoftPrompt, contexts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """New token ids of each context, in order, without the end token.

    Args:
        backbone: the model.
        prompt: the soft prompt.
        contexts: token ids of the contexts, virtual ids included, one batch.
        sampling: how tokens are chosen; sampling draws from a generator of its own seed.
    """
    found: list[list[int]] = [[] for _ in contexts]
    with attached(backbone, prompt) as prefix:
        for group in _groups(backbone, contexts, prefix):
            out = _generate(backbone, [contexts[i] for i in group], prefix, sampling)
            for i, row in zip(group, out, strict=True):
                found[i] = _until(row.tolist(), backbone.end_id)
    return found


def stream(backbone: Backbone, prompt: SoftPrompt, context: Sequence[int], sampling: Sampling) -> Iterator[str]:
    """Pieces of one context's text as they come."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(backbone.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with attached(backbone, prompt) as prefix:
                _generate(backbone, [context], prefix, sampling, streamer=streamer)
        except BaseException as e:  # handed to the reader, who would wait forever otherwise
            failure.append(e)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if failure:
        raise failure[0]


def _groups(backbone: Backbone, contexts: Sequence[Sequence[int]], prefix: Prefix | None) -> list[list[int]]:
    """Contexts that may be padded together.

    A prefix lies in the cache in front of the pads. A sliding window counts places, pads too, so
    there only contexts of one length go together.
    """
    if prefix is None or getattr(backbone.config, "sliding_window", None) is None:
        return [list(range(len(contexts)))]
    lengths = [len(c) for c in contexts]
    return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]


class _RealIdsOnly:
    """A logits processor that sees neither virtual ids, which index past the vocabulary, nor pads.

    In their place it sees another id of the same row, which it sees anyway.
    """

    def __init__(self, processor: Any, base: int, stand_in: int) -> None:
        self.processor, self.base, self.stand_in = processor, base, stand_in

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        real = ids < self.base
        first = ids.gather(1, real.int().argmax(1, keepdim=True))
        own = first.masked_fill(first >= self.base, self.stand_in)  # a row without any text
        out: torch.Tensor = self.processor(torch.where(real, ids, own), scores)
        return out


def _generate(
    backbone: Backbone, contexts: Sequence[Sequence[int]], prefix: Prefix | None, sampling: Sampling,
    streamer: Any = None,
) -> torch.Tensor:  # fmt: skip
    """What is written after each context ``[B, N]``."""
    from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    ids, mask = left_pad(contexts)
    ids = ids.masked_fill(mask == 0, backbone.vocab_size)
    cache: dict[str, Any] = {}
    if prefix:  # generate wants ids for what lies in the cache and never reads them
        size = (len(ids), prefix.size)
        ids = torch.cat([ids.new_full(size, backbone.vocab_size), ids], dim=1)
        mask = torch.cat([mask.new_ones(size), mask], dim=1)
        cache["past_key_values"] = prefix.cache(len(ids), keep=True)
    sample = sampling.temperature >= COLDEST
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
            **cache,
        )
    return out[:, ids.shape[1] :]


def _cuda_devices(backbone: Backbone) -> list[torch.device]:
    return [backbone.device] if backbone.device.type == "cuda" else []


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
