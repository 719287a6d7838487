"""What is asked of vLLM once for the record, and of its doubles ever after."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch

import serving_checks as checks
import tiny
import tiny_vllm
from foreword.prompts.soft import SoftPrompt
from foreword.serving import wire
from foreword.serving.engine import Decoding, Engine, EngineRefused, Request, ScoreRequest

ROWS = {"r0": 4, "r1": 32}
CONTEXT = tuple(range(20, 32))
TEXTS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "plain": (None, {"max_tokens": 6}),
    "soft": ("r0", {"max_tokens": 6}),
    "other soft": ("r1", {"max_tokens": 6}),
    "alternatives": ("r0", {"max_tokens": 3, "top_logprobs": 2}),
    "own alone": (None, {"max_tokens": 3, "top_logprobs": 0}),
    "end": (None, {"max_tokens": 5, "logit_bias": {0: 100.0}}),
    "end asked for": (None, {"max_tokens": 5, "logit_bias": {0: 100.0}, "stop_ids": (0,)}),
    "end passed over": (None, {"max_tokens": 3, "logit_bias": {0: 100.0}, "ignore_eos": True}),
    "drawn": (
        "r1",
        {"max_tokens": 4, "temperature": 0.9, "top_p": 0.8, "top_k": 40, "min_p": 0.01, "seed": 7,
         "presence_penalty": 0.5, "frequency_penalty": 0.25, "top_logprobs": 1},
    ),
    "repetition": (None, {"max_tokens": 4, "repetition_penalty": 1.5}),
}  # fmt: skip
SCORES: dict[str, tuple[str | None, tuple[tuple[int, ...], ...]]] = {
    "labels": ("r0", ((5,), (9,))),
    "words": ("r1", ((5, 7, 0), (5, 8), (9,))),
    "plain": (None, ((5, 7), (6,))),
}
TOO_HOT = Request("hot", CONTEXT, None, Decoding(temperature=3.0))


def prompts() -> dict[str, SoftPrompt]:
    return dict(zip(ROWS, checks.prompts_of(tiny_vllm.backbone(), list(ROWS.values())).values(), strict=True))


def local(key: str | None) -> tuple[int, ...]:
    return (*range(tiny.VOCAB, tiny.VOCAB + (ROWS[key] if key else 0)), *CONTEXT)


async def play(engine: Engine) -> dict[str, Any]:
    """The answers to all of it, one after the other, as JSON."""
    await checks.load(engine, prompts())
    texts, scores = {}, {}
    for name, (key, decoding) in TEXTS.items():
        request = Request(name, local(key), key, Decoding(**decoding), "a-salt")
        texts[name] = [wire.pack_token(t) for t in await checks.collect(engine.generate(request))]
    for name, (key, branches) in SCORES.items():
        scores[name] = await engine.score(ScoreRequest(name, local(key), branches, key, "a-salt"))
    refused = ""
    try:
        await checks.collect(engine.generate(TOO_HOT))
    except EngineRefused as e:
        refused = str(e)
    return {"texts": texts, "scores": scores, "refused": refused}


def packed(rows: torch.Tensor) -> dict[str, Any]:
    """Embeddings as the record keeps them: half precision is enough to know them again."""
    half = rows.numpy().astype(np.float16)
    return {"shape": list(half.shape), "float16": base64.b64encode(half.tobytes()).decode()}


def same_rows(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two packed embeddings are the same up to rounding."""
    left, right = (np.frombuffer(base64.b64decode(x["float16"]), np.float16).astype(np.float32) for x in (a, b))
    return bool(a["shape"] == b["shape"] and np.allclose(left, right, atol=4e-3))
