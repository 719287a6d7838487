"""Round by round: for models that transformers does not batch continuously (ALiBi's BLOOM, GPT-J).

What waits is taken together, padded on the left, and written to its end by transformers' own ``generate``;
then the next round. Requests of different soft prompts share a round, as virtual ids stand in their rows;
those of one prefix go together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from foreword.backbone.forward import Prefix
from foreword.backbone.layout import left_pad
from foreword.backbone.load import Backbone
from foreword.serving.engines.choosing import Chooser, Deliver, Writer

log = logging.getLogger("foreword")


class Rounds:
    """Runs requests in rounds, in a thread of its own.

    Args:
        backbone: the model; its embedding answers the requests' ids.
        chooser: chooses each row's token.
        deliver: told of every step.
        most: rows of a round.
        tokens: most tokens of a request, what it reads and writes.
    """

    takes_prefixes = True
    kv_usage = 0.0

    def __init__(self, backbone: Backbone, chooser: Chooser, deliver: Deliver, most: int, tokens: int) -> None:
        from transformers import GenerationConfig

        self.backbone, self.chooser, self.deliver, self.most, self.tokens = backbone, chooser, deliver, most, tokens
        # generate takes what a configuration leaves out from the model's own: above all its end token.
        self._models_own, backbone.model.generation_config = backbone.model.generation_config, GenerationConfig()
        self._failed = False
        self._waiting: list[Writer] = []
        self._now: list[Writer] = []
        self._change = threading.Condition()
        self._pauses = 0
        self._resting = True
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests of this round that are not over."""
        return sum(not r.over for r in self._now)

    @property
    def waiting(self) -> int:
        """Requests of later rounds."""
        return len(self._waiting)

    def is_running(self) -> bool:
        """Whether requests can be taken."""
        return self._thread.is_alive() and not self._closed and not self._failed

    def add(self, request: Writer) -> None:
        """Takes a request into the next round."""
        with self._change:
            self._waiting.append(request)
            self._change.notify_all()

    def cancel(self, request_id: str) -> None:
        """Ends a request; its row is carried along unread until the round is over."""
        with self._change:
            self._waiting = [r for r in self._waiting if r.id != request_id]
            for r in self._now:
                r.over = r.over or r.id == request_id

    def forget_blocks(self) -> None:
        """Nothing is cached between rounds."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """The model is the caller's inside."""
        with self._change:
            self._pauses += 1
            self._change.wait_for(lambda: self._resting or not self._thread.is_alive())
        try:
            yield
        finally:
            with self._change:
                self._pauses -= 1
                self._change.notify_all()

    def stop(self) -> None:
        """Ends the round at its next step, and the thread."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join(timeout=60)
        self.backbone.model.generation_config = self._models_own

    def _run(self) -> None:
        try:
            while self._next():
                self._round(self._now)
        except Exception as e:  # the requests under way are told, and that none can be taken any more
            log.error("generation failed: %r", e)
            self._failed = True
            self.deliver([(r, True, str(e)) for r in (*self._now, *self._waiting) if not r.over])
        finally:
            with self._change:
                self._resting = True
                self._change.notify_all()

    def _next(self) -> bool:
        """Takes the next round: the oldest request and those that read the same prefix."""
        with self._change:
            self._resting, self._now = True, []
            self._change.notify_all()
            self._change.wait_for(lambda: self._closed or (self._waiting and not self._pauses))
            if self._closed:
                return False
            prefix = self._waiting[0].prefix
            self._now = [r for r in self._waiting if r.prefix is prefix][: self.most]
            self._waiting = [r for r in self._waiting if r not in self._now]
            self._resting = False
            return True

    def _between_steps(self) -> None:
        """Lets others use the model."""
        with self._change:
            if self._pauses:
                self._resting = True
                self._change.notify_all()
                self._change.wait_for(lambda: not self._pauses)
                self._resting = False

    @torch.no_grad()
    def _round(self, rows: list[Writer]) -> None:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        backbone = self.backbone
        ids, mask = left_pad([r.ids[len(r.prefix.ids) if r.prefix else 0 :] for r in rows])
        ids = ids.masked_fill(mask == 0, backbone.vocab_size)
        given: dict[str, Any] = {}
        if rows[0].prefix is not None:  # generate wants ids for what lies in the cache and never reads them
            layers = tuple((k[None], v[None]) for k, v in rows[0].prefix.layers)
            prefix = Prefix(layers, len(rows[0].prefix.ids))
            size = (len(rows), prefix.size)
            ids = torch.cat([ids.new_full(size, backbone.vocab_size), ids], dim=1)
            mask = torch.cat([mask.new_ones(size), mask], dim=1)
            given["past_key_values"] = prefix.cache(len(rows), keep=True)
        config = GenerationConfig(
            max_new_tokens=max(r.decoding.max_tokens for r in rows),
            do_sample=False,
            pad_token_id=backbone.end_id,
        )
        backbone.model.generate(
            input_ids=ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choosing(self.chooser, rows)]),
            stopping_criteria=StoppingCriteriaList([_Steps(self, rows)]),
            **given,
        )

    def step_done(self, rows: Sequence[Writer]) -> torch.Tensor:
        """Delivers a step; returns which rows are over ``[R]``."""
        fresh = [r for r in rows if not r.over]
        for r in fresh:
            r.over = r.ended
        self.deliver([(r, r.over, None) for r in fresh])
        self._between_steps()
        return torch.tensor([r.over or self._closed for r in rows])


class _Choosing:
    """The chooser as one of ``generate``'s logits processors."""

    def __init__(self, chooser: Chooser, rows: Sequence[Writer]) -> None:
        self.chooser, self.rows = chooser, rows

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.chooser.expect([None if r.over else r for r in self.rows])
        return self.chooser(ids, scores.clone(), scores)


class _Steps:
    """A stopping criterion: asked after every step."""

    def __init__(self, rounds: Rounds, rows: Sequence[Writer]) -> None:
        self.rounds, self.rows = rounds, rows

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self.rounds.step_done(self.rows).to(ids.device)
