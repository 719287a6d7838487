"""Half an hour of everything at once: is every answer right, and does memory stand still?

    .venv/bin/python benchmarks/soak.py [--minutes 30 --clients 16 --engine vllm --vllm .venv-vllm/bin/python]

Real clients ask a real gateway for texts (whole, streamed, through the template, as chats) and label probabilities of
some forty soft prompts, and leave in the middle of some. An admin meanwhile loads, unloads and replaces soft prompts in
place by other contents of the same name; fewer fit the memory than there are, so they come and go by themselves too.

All right answers are computed beforehand, one at a time, by the library. An answer that came during a switch may be
the old content's or the new one's, nothing else. Exit code 1 where an answer was wrong, a call failed, or the memory of
the gateway's processes grew by 5 % or more between the third minute and the end. Writes DATE-soak.json into
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import results
import torch
from measure import digits
from serving_load import NO_ANSWER, Answer, Call, opened, percentiles, send
from serving_ours import Gateway, Setting, end_kindly, names, prepare, write_prompts
from soak_truth import ALTERNATIVES, BASE, Name, is_right, precomputed

TEXTS, CHATS, LABELS = "/v1/completions", "/v1/chat/completions", "/v1/classify"
KINDS = {
    "text": 3, "text streamed": 3, "row": 2, "chat": 2, "chat streamed": 2, "classify": 4, "left": 2, "left stream": 2,
}  # fmt: skip
"""What clients do, and how often."""
PLAIN = ("text", "text streamed", "left", "left stream")
"""What can be asked of the plain model."""
SAMPLE_SECONDS = 10.0
LEAST_SAMPLES = 50
SETTLED = 0.1
"""Share of the run after which memory counts: three minutes of thirty."""
WINDOW = 0.1
"""Share of the run over which memory is averaged at either end."""
MOST_GROWTH = 0.05
CALL_SECONDS = 60.0
"""Most that a call may take; then it has failed."""
PATIENCE_SECONDS = 0.5
"""Most that a client who leaves has waited."""
NOT_FOUND = 404
SERVER_ERROR = 500


@dataclass
class Tally:
    """What has happened so far."""

    began: float
    requests: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    admin: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    compared: int = 0
    server_errors: int = 0


@dataclass(frozen=True)
class Soak:
    """A run under way: the gateway it asks, what may be asked, and what has happened."""

    args: argparse.Namespace
    setting: Setting
    names: Sequence[Name]
    gateway: Gateway
    tally: Tally

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.tally.began

    @property
    def over(self) -> bool:
        """Whether its time is over."""
        return bool(self.seconds >= 60 * self.args.minutes)


def call(kind: str, name: str, text: str, setting: Setting, tokens: int) -> Call:
    """A client's request of a kind."""
    if kind == "classify":
        return Call(LABELS, {"model": name, "input": text})
    body: dict[str, Any] = {"model": name, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    if "stream" in kind:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind.startswith("chat"):
        return Call(CHATS, body | {"messages": [{"role": "user", "content": text}]})
    if kind == "row":
        return Call(TEXTS, body | {"columns": {setting.column: text}})
    return Call(TEXTS, body | {"prompt": setting.rendered(text)})


async def client(soak: Soak, seed: int) -> None:
    """One client: request after request until the time is over."""
    rng, tokens = random.Random(seed), soak.args.new_tokens
    async with opened(soak.gateway.url, 1, limit=CALL_SECONDS) as http:
        while not soak.over:
            name = rng.choice(soak.names)
            kind = rng.choices(list(KINDS), [n * (name.name != BASE or k in PLAIN) for k, n in KINDS.items()])[0]
            text = rng.choice(list(name.answers))
            soak.tally.requests[kind] += 1
            with name.watched() as allowed:
                sent = call(kind, name.name, text, soak.setting, tokens)
                if kind.startswith("left"):
                    answer = await left(soak, sent, rng.uniform(0, PATIENCE_SECONDS))
                else:
                    answer = await send(http, sent, soak.tally.began)
            if answer:
                judge(soak.tally, kind, name, text, answer, allowed)


async def left(soak: Soak, sent: Call, seconds: float) -> Answer | None:
    """Waits a moment and goes away, which closes the connection; the answer, where it was quicker.

    Over a connection of its own: a pool of connections counts those of calls that were cancelled for good.
    """
    async with opened(soak.gateway.url, 1) as http:
        task = asyncio.ensure_future(send(http, sent, soak.tally.began))
        done, _ = await asyncio.wait([task], timeout=seconds)
        task.cancel()
        await asyncio.wait([task])
    return task.result() if done else None


def judge(tally: Tally, kind: str, name: Name, text: str, answer: Answer, allowed: set[str | None]) -> None:
    """Counts an answer, and keeps it where it is none of those that were right meanwhile."""
    if answer.status == NOT_FOUND and None in allowed:
        tally.refused[str(NOT_FOUND)] += 1
        return
    if answer.error:
        broken = "connection" if answer.status == NO_ANSWER else str(answer.status)
        tally.server_errors += answer.status >= SERVER_ERROR
        tally.errors[f"{kind}: {broken}"] += 1
        print(f"error: {kind} of {name.name}: {answer.status} {answer.error}", flush=True)
        return
    tally.compared += 1
    tally.latency.append(answer.ended - answer.began)
    right = [name.answers[text][content] for content in allowed if content]
    if not any(is_right(kind, answer, e) for e in right):
        tally.wrong.append(
            {"kind": kind, "name": name.name, "text": text, "said": answer.text or answer.reply["data"],
             "right": [e.probabilities if kind == "classify" else e.text for e in right]}
        )  # fmt: skip
        print(f"wrong: {tally.wrong[-1]}", flush=True)


async def admin(soak: Soak) -> None:
    """Loads, unloads and replaces soft prompts all the while."""
    rng = random.Random(soak.args.seed)
    async with opened(soak.gateway.url, 1, limit=CALL_SECONDS) as http:
        while not soak.over:
            name = rng.choice([n for n in soak.names if n.name != BASE])
            action, content, sent = change(name, rng)
            with name.changing(content):
                answer = await send(http, sent, soak.tally.began)
                if answer.error:
                    raise RuntimeError(f"the admin's {action} of {name.name} failed: {answer}")
            soak.tally.admin[action] += 1
            await asyncio.sleep(rng.uniform(0, 2 * soak.args.pause))


def change(name: Name, rng: random.Random) -> tuple[str, str | None, Call]:
    """What the admin does to a name: the action, what it stands for afterwards, and the call."""
    own, other = name.contents
    if name.current is not None and rng.random() < 1 / 8:
        return "unload", None, Call("/v1/unload_soft_prompt", {"name": name.name})
    if name.current is None and rng.random() < 1 / 2:
        return "load", own, Call("/v1/load_soft_prompt", {"name": name.name})
    content = own if name.current == other else other
    path = name.name if content == own else f"{ALTERNATIVES}/{name.name}"
    body = {"name": name.name, "path": path, "load_inplace": True}
    return "replace" if name.current else "load", content, Call("/v1/load_soft_prompt", body)


async def watch(soak: Soak) -> None:
    """Samples the memory of the gateway's processes, and says how it goes."""
    tally = soak.tally
    while not soak.over:
        sizes = {key: digits(size / 1e6, 5) for key, size in soak.gateway.rss_by_process().items()}
        tally.memory.append({"s": round(soak.seconds, 1), **sizes})
        if len(tally.memory) % 6 == 0:
            done = f"{soak.seconds / 60:.1f} min: {tally.requests.total()} requests, {tally.compared} answers compared"
            print(f"{done}, {len(tally.wrong)} wrong, {tally.errors.total()} errors, {sizes} MB", flush=True)
        await asyncio.sleep(min(SAMPLE_SECONDS, 60 * soak.args.minutes / LEAST_SAMPLES))


def growth(memory: Sequence[Mapping[str, float]], seconds: float) -> dict[str, Any]:
    """MB after the beginning and at the end (medians), and how much more that is."""
    first = [m for m in memory if SETTLED * seconds <= m["s"] <= (SETTLED + WINDOW) * seconds]
    last = [m for m in memory if m["s"] >= (1 - WINDOW) * seconds]
    found: dict[str, Any] = {}
    for key in ("gateway", "workers", "both"):
        before, after = (
            statistics.median(m["gateway"] + m["workers"] if key == "both" else m[key] for m in part)
            for part in (first, last)
        )
        found[key] = {"mb_before": before, "mb_after": after, "growth": digits(after / before - 1, 3)}
    return found


async def everybody(soak: Soak) -> None:
    """Clients, admin and watcher at once, until the time is over or one of them cannot go on."""
    clients = (client(soak, soak.args.seed + i) for i in range(soak.args.clients))
    tasks = [asyncio.ensure_future(work) for work in (*clients, admin(soak), watch(soak))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run, as the results file holds it."""
    torch.set_num_threads(args.threads)
    setting = prepare(args.model, args.data, args.text, args.label, args.virtual_tokens, args.split)
    prompts = names(args.prompts)
    known = precomputed(setting, prompts, args.texts, args.new_tokens)
    with tempfile.TemporaryDirectory() as place:
        write_prompts(setting, Path(place), prompts)
        others = {n.name: n.contents[1] for n in known if n.name != BASE}
        write_prompts(setting, Path(place) / ALTERNATIVES, others)
        options = ["--name", BASE, "--engine", args.engine, "--dtype", "float32", "--prompt-memory", str(args.memory)]
        options += ["--kv-memory", str(args.kv_memory)]
        options += ["--vllm-python", args.vllm] if args.engine == "vllm" else []
        with Gateway(args.model, Path(place), args.threads, options) as gateway:
            print(f"gateway ready after {gateway.start_s:.0f} s", flush=True)
            soak = Soak(args, setting, known, gateway, Tally(time.perf_counter()))
            asyncio.run(everybody(soak))
            metrics = gateway.get("/metrics").text
    return facts(args, soak.tally) | {"evictions": evictions(metrics)}


def facts(args: argparse.Namespace, tally: Tally) -> dict[str, Any]:
    """What is kept of a run."""
    return {
        **results.facts(torch.device("cpu")), "kind": "soak", "dtype": "float32", "seed": args.seed,
        "model": results.data_name(args.model), "rows": results.data_name(args.data), "engine": args.engine,
        "minutes": args.minutes, "clients": args.clients, "prompts": args.prompts, "prompt_memory_mb": args.memory,
        "requests": tally.requests.total(), "by_kind": dict(tally.requests), "compared": tally.compared,
        "wrong": len(tally.wrong), "wrong_answers": tally.wrong[:20], "errors": dict(tally.errors),
        "server_errors": tally.server_errors, "unloaded_404": tally.refused.total(), "admin": dict(tally.admin),
        "latency_ms": percentiles(tally.latency), "memory": growth(tally.memory, 60 * args.minutes),
        "memory_samples": tally.memory,
    }  # fmt: skip


def evictions(metrics: str) -> float:
    """Soft prompts that made room for others."""
    lines = [line.split() for line in metrics.splitlines() if line.startswith("foreword:soft_prompt_evictions_total")]
    return float(lines[0][-1])


def failures(found: Mapping[str, Any]) -> list[str]:
    """What must not have happened."""
    grown = found["memory"]["both"]["growth"]
    return [
        *([f"{found['wrong']} wrong answers"] if found["wrong"] else []),
        *([f"calls failed: {found['errors']}"] if found["errors"] else []),
        *([f"memory grew by {grown:.1%}"] if grown >= MOST_GROWTH else []),
        *(["nothing was compared"] if not found["compared"] else []),
    ]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--data", default="bundled:complaints")
    made.add_argument("--split", default="test")
    made.add_argument("--text", default="text", help="input column")
    made.add_argument("--label", default="label", help="label column")
    made.add_argument("--minutes", type=float, default=30)
    made.add_argument("--clients", type=int, default=16)
    made.add_argument("--prompts", type=int, default=40)
    made.add_argument("--texts", type=int, default=4, help="texts asked of every soft prompt")
    made.add_argument("--virtual-tokens", type=int, default=16)
    made.add_argument("--new-tokens", type=int, default=12)
    made.add_argument("--memory", type=int, default=1, help="MB of soft prompts loaded at once (1: 28 of 40)")
    made.add_argument("--kv-memory", type=int, default=256, help="MB of the cache of keys and values, taken at once")
    made.add_argument("--pause", type=float, default=0.3, help="mean seconds between two of the admin's calls")
    made.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    made.add_argument("--vllm", default="", metavar="PYTHON", help="of vLLM's environment")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    made.add_argument("--name", default="", help="added to the file's name; without it a day has one file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it, writes the file, and says what must not have happened."""
    args = parser().parse_args(argv)
    found = run(args)
    path = results.write(found, args.out, args.name)
    shown = ("requests", "compared", "wrong", "errors", "server_errors", "unloaded_404", "admin", "evictions", "memory")
    print(json.dumps({key: found[key] for key in shown}, indent=2))
    print(f"wrote {path.name}")
    failed = failures(found)
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    end_kindly()
    raise SystemExit(main())
