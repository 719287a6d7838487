"""How many soft prompts one gateway holds: bytes for each further one, and thousands asked for at random."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from measure import digits
from serving_load import Call, Client, percentiles
from serving_ours import Ask, Gateway, Setting, names, right_text, verdict, write_prompts

MIB = 2**20
FLOAT = 4
BURST = 16
"""Requests under way at once over the registered soft prompts."""
NEW_TOKENS = 4
SETTLE_SECONDS = 1.0
COUNTERS = ("hits", "misses", "evictions")
Start = Callable[..., Gateway]
"""A gateway over a folder, with more of its command line."""


def measure_memory(setting: Setting, start: Start, counts: Sequence[int]) -> dict[str, Any]:
    """Memory of the gateway's processes with so many soft prompts loaded, and bytes for each further one.

    Args:
        setting: what the soft prompts are made for.
        start: makes the gateway.
        counts: soft prompts loaded, growing.
    """
    own = setting.virtual_tokens * setting.backbone.hidden_size * FLOAT
    room = 2 * counts[-1] * own // MIB + 1
    held_at: dict[int, dict[str, int]] = {}
    with stored(setting, counts[-1]) as (folder, prompts), start(folder, "--prompt-memory", str(room)) as gateway:
        loaded = 0
        for count in counts:
            for name in prompts[loaded:count]:
                gateway.post("/v1/load_soft_prompt", {"name": name})
            loaded = count
            time.sleep(SETTLE_SECONDS)
            held_at[count] = gateway.memory()
            print(f"memory, {count} loaded: {held_at[count]}", flush=True)
    further = {
        f"{a} to {b}": {key: round((held_at[b][key] - held_at[a][key]) / (b - a)) for key in held_at[b]}
        for a, b in pairwise(counts)
    }
    last = further[f"{counts[-2]} to {counts[-1]}"]
    share = {key: digits(size / own, 3) for key, size in last.items()}
    return {"memory": {"own_bytes": own, "held": held_at, "bytes_per_prompt": further, "of_own": share}}


def measure_registered(setting: Setting, start: Start, args: argparse.Namespace) -> dict[str, Any]:
    """Many soft prompts in one folder, a part of them loaded: requests drawn evenly, and by Zipf's law.

    Args:
        setting: what the soft prompts are made for.
        start: makes the gateway.
        args: ``registered``, ``requests``, ``prompt_memory`` in MB, ``check``.
    """
    own = setting.virtual_tokens * setting.backbone.hidden_size * FLOAT
    began = time.perf_counter()
    memory = ("--prompt-memory", str(args.prompt_memory))
    with stored(setting, args.registered) as (folder, prompts), Client() as client:
        print(f"registered: {len(prompts)} folders written in {time.perf_counter() - began:.0f} s", flush=True)
        with start(folder, *memory) as gateway:
            found: dict[str, Any] = {
                "registered": len(prompts), "prompt_memory_mb": args.prompt_memory, "concurrent": BURST,
                "new_tokens": NEW_TOKENS, "fit": args.prompt_memory * MIB // own, "start_s": digits(gateway.start_s, 3),
                "list_ms": listed(gateway, len(prompts)),
            }  # fmt: skip
            draws = {"one": [1.0] + [0.0] * (len(prompts) - 1), "even": [1.0] * len(prompts), "zipf": zipf(prompts)}
            verdicts: list[str] = []
            for name, weights in draws.items():
                part = args.requests // 2 if name != "one" else args.requests // 10
                drawn = random.Random(setting.seed).choices(prompts, weights, k=max(part, 1))
                found[name], said = burst(setting, client, gateway, drawn, args.check)
                verdicts += said
                print(f"registered, {name}: {found[name]}", flush=True)
            found["held_mb"] = {key: digits(size / 1e6) for key, size in gateway.memory().items()}
    found["answers"] = {v: verdicts.count(v) for v in ("equal", "tie", "wrong")}
    return {"registered": found}


def burst(
    setting: Setting, client: Client, gateway: Gateway, drawn: Sequence[str], check: int
) -> tuple[dict[str, Any], list[str]]:
    """Requests to these soft prompts: rate, latency and share of hits; and verdicts of a sample."""
    asks = setting.asks(len(drawn), drawn)
    calls = [Call("/v1/completions", body(setting, ask)) for ask in asks]
    before = counters(gateway)
    found = client.run(gateway.url, calls, BURST)
    failed = [a for a in found.answers if a.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first with {failed[0]}\n{gateway.said()}")
    counted = {key: value - before[key] for key, value in counters(gateway).items()}
    step = max(len(asks) // check, 1)
    verdicts = [
        verdict(setting, right_text(setting, ask, NEW_TOKENS), answer.text)
        for ask, answer in list(zip(asks, found.answers, strict=True))[::step]
    ]
    return {
        "requests": len(asks), "prompts": len(set(drawn)), **counted,
        "hit_rate": digits(counted["hits"] / len(asks), 3),
        "requests_per_s": digits(len(asks) / found.seconds),
        "latency_ms": percentiles([a.ended - a.began for a in found.answers]),
    }, verdicts  # fmt: skip


def body(setting: Setting, ask: Ask) -> dict[str, Any]:
    """A short completion."""
    text = setting.rendered(ask.text)
    return {"model": ask.prompt, "prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}


def counters(gateway: Gateway) -> dict[str, float]:
    """Hits, misses and evictions so far, from the gateway's own metrics."""
    lines = [line.split() for line in gateway.get("/metrics").text.splitlines() if line.startswith("foreword:")]
    values = {line[0].partition("{")[0]: float(line[-1]) for line in lines}
    return {key: values[f"foreword:soft_prompt_{key}_total"] for key in COUNTERS}


def listed(gateway: Gateway, count: int) -> float:
    """Milliseconds that listing all models takes."""
    began = time.perf_counter()
    cards = gateway.get("/v1/models").json()["data"]
    spent = time.perf_counter() - began
    if len(cards) != count + 1:
        raise RuntimeError(f"{len(cards)} models are listed, not {count} soft prompts and the base")
    return digits(1e3 * spent, 3)


def zipf(prompts: Sequence[str]) -> list[float]:
    """Weights of Zipf's law: the n-th is asked for 1/n as often as the first."""
    return [1 / n for n in range(1, len(prompts) + 1)]


@contextmanager
def stored(setting: Setting, count: int) -> Iterator[tuple[Path, list[str]]]:
    """A folder with so many soft prompts, gone afterwards."""
    with tempfile.TemporaryDirectory() as place:
        prompts = names(count)
        write_prompts(setting, Path(place), prompts)
        yield Path(place), prompts
