"""Choosing the next token of every request in a continuous batch, each by its own rules.

transformers' continuous batching draws for all requests alike: one ``do_sample``, one seed, no penalties.
Here it is left to take the likeliest token, and what is likeliest is arranged before: each request's
token is chosen from its own logits, by its own generator, so that a seed gives the same text in any batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foreword.serving.engine import Decoding
from foreword.serving.engines.ids import Slot


@dataclass(frozen=True)
class Chosen:
    """A token with what was asked about it."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Writer:
    """A running request, as the loop that runs it knows it.

    ``ids``: of the running model, a prefix's in front. ``read``: the text among them. ``prefix``: of the soft
    prompt, where it is one.
    """

    id: str
    ids: Sequence[int]
    read: Sequence[int]
    decoding: Decoding
    end_id: int
    prefix: Slot | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    written: list[int] = field(default_factory=list)
    fresh: list[Chosen] = field(default_factory=list)
    """Chosen and not yet delivered."""
    computed: int = 0
    """Context tokens that passed through the model; the others were cached."""
    over: bool = False

    def __post_init__(self) -> None:
        if self.decoding.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.decoding.seed)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens after which nothing is written."""
        d = self.decoding
        return d.stop_ids if d.ignore_eos else (*d.stop_ids, self.end_id)

    @property
    def ended(self) -> bool:
        """Whether what is written is all."""
        return len(self.written) >= self.decoding.max_tokens or (bool(self.written) and self.written[-1] in self.ends)

    @property
    def cached(self) -> int:
        """Context tokens whose keys and values were there already."""
        return max(len(self.ids) - self.computed, 0)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        d = self.decoding
        return d.greedy and d.top_logprobs is None and not self.adjusts

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before anything is chosen."""
        d = self.decoding
        penalised = d.repetition_penalty != 1.0 or d.presence_penalty != 0.0 or d.frequency_penalty != 0.0
        return penalised or bool(d.logit_bias)


Deliver = Callable[[list[tuple[Writer, bool, str | None]]], None]
"""Told from the loop's thread: who has fresh tokens, whether it is over, and what went wrong."""


class Chooser:
    """Chooses for a whole batch, and counts what was cached.

    It stands where the continuous batch has its logits processors, and has their five methods.

    Args:
        writers: the running requests by id.
    """

    do_processing = True
    tensors_required = 0

    def __init__(self, writers: Mapping[str, Writer]) -> None:
        self._writers = writers
        self._batch: list[Writer | None] = []
        self.queries = self.hits = 0

    def clear(self) -> None:
        """Nothing to forget."""

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Requests bring no arguments this way."""

    def fill_defaults(self, storage: torch.Tensor) -> None:
        """No arguments are stored in tensors."""

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Remembers whose tokens the coming forward pass predicts, in their order."""
        batch: list[Writer | None] = []
        for request in requests_in_batch:
            writer = self._writers.get(request.state.request_id)
            if writer is not None and not writer.written:
                writer.computed += request.query_length
            if request.has_new_token:
                batch.append(writer)
        self.expect(batch)
        return arg_storage

    def expect(self, batch: Sequence[Writer | None]) -> None:
        """Whose tokens the coming logits predict, row by row; None: nobody's."""
        self._batch = list(batch)
        for writer in batch:
            if writer is not None and not writer.written:
                self.queries += len(writer.ids)
                self.hits += writer.cached

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
        """``scores`` ``[R, V]``; afterwards the likeliest of a row is the token chosen for it."""
        likeliest = scores.argmax(-1).tolist()
        for i, writer in enumerate(self._batch):
            if writer is None:  # aborted between scheduling and now
                continue
            chosen = Chosen(likeliest[i]) if writer.plain else choose(scores[i], writer)
            if chosen.id != likeliest[i]:
                scores[i, chosen.id] = torch.inf
            writer.written.append(chosen.id)
            writer.fresh.append(chosen)
        return scores


def choose(logits: torch.Tensor, writer: Writer) -> Chosen:
    """The next token from logits ``[V]``, with its log-probability under the model if asked for."""
    d = writer.decoding
    adjusted = _adjusted(logits, writer) if writer.adjusts else logits
    token = int(adjusted.argmax()) if d.greedy else _draw(adjusted, d, writer.generator)
    if d.top_logprobs is None:
        return Chosen(token)
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(d.top_logprobs) if d.top_logprobs else (logprobs[:0], logprobs[:0].long())
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), top)


def _adjusted(logits: torch.Tensor, writer: Writer) -> torch.Tensor:
    """Bias and penalties: repetition over context and answer (CTRL's), the others over the answer (OpenAI's)."""
    d, out = writer.decoding, logits.clone()
    if d.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*writer.read, *writer.written}), dtype=torch.long, device=out.device)
        old = out[seen]
        out[seen] = torch.where(old > 0, old / d.repetition_penalty, old * d.repetition_penalty)
    if d.presence_penalty or d.frequency_penalty:
        for token, count in Counter(writer.written).items():
            out[token] -= d.presence_penalty + d.frequency_penalty * count
    for token, bias in d.logit_bias.items():
        out[token] += bias
    return out


def _draw(logits: torch.Tensor, d: Decoding, generator: torch.Generator) -> int:
    """A draw at the temperature from the likeliest tokens that top_k, top_p and min_p leave."""
    logits = logits.float().cpu() / d.temperature
    ids = None
    if d.top_k or d.top_p < 1.0:
        logits, ids = logits.topk(min(d.top_k, len(logits))) if d.top_k else logits.sort(descending=True)
    probabilities = logits.softmax(-1)
    if d.top_p < 1.0:  # the smallest set that reaches top_p; the likeliest always stays
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= d.top_p, 0.0)
        probabilities[0] = probabilities[0].clamp(min=1e-38)
    if d.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < d.min_p * probabilities.max(), 0.0)
    at = int(torch.multinomial(probabilities, 1, generator=generator))
    return at if ids is None else int(ids[at])
