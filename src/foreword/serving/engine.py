"""The Engine protocol: what the gateway asks of whatever runs the model.

This file needs the standard library and numpy only, so that an engine can live in an environment of
its own (vLLM's). Everything is asynchronous; all calls of one engine come from one event loop.

Token ids of a request are *local*: below ``vocab_size`` they are text, and ``vocab_size + r`` is row
``r`` of the request's own soft prompt. So a soft prompt may stand anywhere in the text. A prefix (keys
and values of every layer) has no ids: it lies in front of everything.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Finish = Literal["stop", "length", "abort"]
"""``stop``: the end token (never delivered) or a stop id (delivered); ``length``: as many tokens as asked for."""


@dataclass(frozen=True)
class Rows:
    """A soft prompt as an engine holds it.

    ``key`` names this content for good: a reloaded soft prompt has another one. ``values`` is ``[P, W]``
    float32: embeddings (``kind`` rows, ``W = H``) or keys and values in PEFT's order (``kind`` prefix).
    """

    key: str
    values: NDArray[np.float32]
    kind: Literal["rows", "prefix"] = "rows"


COLDEST = 1e-5
"""Temperatures below this are greedy: logits over them leave float32."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. A temperature of 0 is greedy.

    ``top_logprobs``: likeliest alternatives reported with each token (0: its own log-probability alone;
    None: no log-probabilities). Log-probabilities are those of the model, before temperature and penalties.
    ``stop_ids``: tokens that end the text beside the end token. ``seed``: the same request draws the same
    tokens whatever else is in the batch; None: other ones each time.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < COLDEST


SAMPLES = tuple(f.name for f in fields(Decoding) if f.name != "max_tokens")
"""The fields of ``Decoding`` beside max_tokens, for an engine that heeds them all."""


@dataclass(frozen=True)
class Request:
    """A text to go on from. ``id`` is unique among running requests.

    ``ids``: local ids (see above), never empty. ``key``: of the soft prompt; None: the plain model. ``salt``:
    requests of different salts share no cached keys and values, so that time betrays nothing between tenants.
    """

    id: str
    ids: tuple[int, ...]
    key: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    salt: str = ""


@dataclass(frozen=True)
class ScoreRequest:
    """Continuations to score after one context: ``branches`` are label words' ids, none empty."""

    id: str
    ids: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    key: str | None = None
    salt: str = ""


@dataclass(frozen=True)
class Token:
    """One event of a text. The last one says how it finished; an end token brings ``id`` -1.

    ``cached``: tokens of the context whose keys and values were there already (in the first event).
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    cached: int = 0


@dataclass(frozen=True)
class Capabilities:
    """What an engine can do, known once it has started.

    ``fingerprint``: of its backbone, as in a sidecar; empty where it cannot be read. ``window``: most
    tokens of soft prompt, context and answer. ``kinds``: of soft prompts it takes. ``max_top_logprobs``:
    alternatives it can report. ``samples``: the fields of ``Decoding`` it heeds beside max_tokens.
    """

    engine: str
    model: str
    vocab_size: int
    hidden_size: int
    window: int
    end_id: int
    dtype: str
    kinds: tuple[str, ...] = ("rows",)
    max_top_logprobs: int = 20
    samples: tuple[str, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    prefix_width: int = 0
    """``W`` of a prefix; 0 where it takes none."""
    quantize: str = ""
    """How its weights are rounded, as in a sidecar; empty where it is not known."""


@dataclass(frozen=True)
class Stats:
    """Counters since the start, and what is running now."""

    running: int = 0
    waiting: int = 0
    prefix_queries: int = 0
    """Context tokens looked up in the cache of keys and values."""
    prefix_hits: int = 0
    kv_usage: float = 0.0
    """Share of the cache of keys and values in use, 0 to 1."""
    prompt_bytes: int = 0
    """Bytes of the soft prompts it holds."""
    restarts: int = 0


class EngineError(Exception):
    """Base of what an engine raises."""


class EngineDown(EngineError):
    """The engine is not there now (starting again, or gone): answer 503 and try again later."""


class EngineRefused(EngineError):
    """This request cannot be run (too long, unknown key, a kind it does not take): answer 400."""


class UnknownPrompt(EngineRefused):
    """The key is not loaded (the engine may have started anew): put it and ask again."""


class Engine(Protocol):
    """Runs one frozen model with many soft prompts."""

    async def start(self) -> Capabilities:
        """Loads the model; returns when requests can be taken."""

    async def close(self) -> None:
        """Ends running requests and gives everything back; may be called twice."""

    async def put(self, rows: Rows) -> None:
        """Takes a soft prompt in; a key it has already is left as it is. Raises EngineRefused when full."""

    async def drop(self, key: str) -> None:
        """Forgets a soft prompt; requests that run with it go on to their end. Unknown keys are passed over."""

    def generate(self, request: Request) -> AsyncIterator[Token]:
        """Tokens as they come, the last with ``finish``. Closing the iterator aborts the request."""

    async def abort(self, request_id: str) -> None:
        """Ends a request: its iterator closes with finish "abort". Unknown ids are passed over."""

    async def score(self, request: ScoreRequest) -> list[float]:
        """Summed log-probability of each branch after the context, in order."""

    async def stats(self) -> Stats:
        """Counters and gauges."""

    @property
    def alive(self) -> bool:
        """Whether requests can be taken now."""

    @property
    def epoch(self) -> int:
        """Grows with every start: soft prompts put in an earlier epoch are gone."""
