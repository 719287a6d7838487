"""What both vLLM engines say alike: decoding in vLLM's words, metrics by its names, and a check of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from foreword.errors import ForewordError
from foreword.serving.engine import Decoding, Engine, EngineRefused, Finish, Request, Rows, Stats, Token

MOST_NAMED = 128
"""Tokens whose log-probabilities one request may ask for (vLLM's MAX_LOGPROB_TOKEN_IDS)."""
AGREEMENT, LOOSE_AGREEMENT = 0.02, 0.5
"""Largest difference of a log-probability between a text and its embeddings: in float32, and in other types."""


def words(decoding: Decoding, end_id: int) -> dict[str, Any]:
    """Sampling parameters, all of them, so that no default of a server or a model's own takes hold.

    The end token is a stop id like others: which one ends a text is then ours to say.
    """
    d = decoding
    stops = [*d.stop_ids, *([] if d.ignore_eos else [end_id])]
    return {
        "max_tokens": d.max_tokens,
        "temperature": d.temperature,
        "top_p": d.top_p,
        "top_k": d.top_k,
        "min_p": d.min_p,
        "repetition_penalty": d.repetition_penalty,
        "presence_penalty": d.presence_penalty,
        "frequency_penalty": d.frequency_penalty,
        "seed": d.seed,
        "stop_token_ids": list(dict.fromkeys(stops)),
        "ignore_eos": True,
    }


def check_length(tokens: int, new: int, window: int) -> None:
    """Raises EngineRefused where a context and what is asked for do not fit; vLLM would cut the answer."""
    if new < 1:
        raise EngineRefused(f"max_tokens is {new}; at least 1")
    if tokens + new > window:
        raise EngineRefused(f"{tokens} tokens and {new} new ones do not fit {window}")


def closes(token: int, decoding: Decoding, end_id: int) -> bool:
    """Whether this token is the end of a text rather than part of it."""
    return token == end_id and not decoding.ignore_eos and token not in decoding.stop_ids


def likeliest(found: Mapping[int, float], count: int) -> tuple[tuple[int, float], ...]:
    """The first ``count`` alternatives, likeliest first; vLLM adds the chosen token where it is none of them."""
    return tuple(sorted(found.items(), key=lambda f: -f[1])[:count])


def finish_of(reason: str | None) -> Finish | None:
    """How vLLM says that a text ended."""
    known: dict[str | None, Finish | None] = {None: None, "stop": "stop", "length": "length", "abort": "abort"}
    return known.get(reason, "abort")


GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:prefix_cache_queries": "prefix_queries",
    "vllm:prefix_cache_hits": "prefix_hits",
    "vllm:kv_cache_usage_perc": "kv_usage",
}


def stats_of(samples: Iterable[tuple[str, float]], prompt_bytes: int) -> Stats:
    """Counters from names and values as vLLM exports them, summed over its engines."""
    found: dict[str, list[float]] = {}
    for name, value in samples:
        if field := GAUGES.get(name.removesuffix("_total")):
            found.setdefault(field, []).append(value)
    usage = found.pop("kv_usage", [0.0])
    counts = {field: int(sum(values)) for field, values in found.items()}
    return Stats(kv_usage=sum(usage) / len(usage), prompt_bytes=prompt_bytes, **counts)


async def check_rows(engine: Engine, probe: Rows, ids: Sequence[int], vocab_size: int, dtype: str) -> None:
    """Reads a text as ids and as the rows that the embedding gives for them; both must say the same.

    Some models scale embeddings, or read ids beside them; soft prompts trained elsewhere would mean
    something else here without a word.

    Raises:
        ForewordError: they differ, by more than rounding.
    """
    await engine.put(probe)
    virtual = tuple(range(vocab_size, vocab_size + len(ids)))
    found = []
    for key, context in ((None, tuple(ids)), (probe.key, virtual)):
        request = Request(f"probe-{key}", (*context, ids[0]), key, Decoding(max_tokens=1, top_logprobs=5))
        tokens = [t async for t in engine.generate(request)]
        found.append(tokens[0])
    await engine.drop(probe.key)
    allowed = AGREEMENT if dtype == "float32" else LOOSE_AGREEMENT
    if not _alike(found[0], found[1], allowed):
        raise ForewordError(
            "vLLM answers otherwise when it is given embeddings instead of tokens",
            "this model, or another one than the server's",
            "serve it with --engine transformers, or name the model that the server runs",
        )


def _alike(a: Token, b: Token, allowed: float) -> bool:
    """Whether what both list agrees, and both list mostly the same."""
    left, right = dict(a.top), dict(b.top)
    both = left.keys() & right.keys()
    return 2 * len(both) > len(left) and all(abs(left[i] - right[i]) <= allowed for i in both)
