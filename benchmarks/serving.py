"""Serving many soft prompts at once: our gateway on its engines, PEFT switching adapters, and plain transformers.

    .venv/bin/python benchmarks/serving.py [--vllm .venv-vllm/bin/python] [--sections throughput ratio classify]

Contenders take turns, round by round, in one run; figures are medians with their spread. The gateway is a subprocess,
its client another process that speaks HTTP to it; PEFT and transformers answer in process and without HTTP. No text
comes twice, so no cache knows it. Answers are compared with one-at-a-time generation.

- throughput: 64 concurrent requests over 1, 8 and 64 soft prompts of 16 rows, 32 new tokens each
- ratio: 8 mixed soft prompts against the plain base through the same engine, on the same messages
- classify: 64 concurrent classifications against generating the label and comparing texts, as PEFT's guide does
- memory: bytes of the gateway's processes for every further soft prompt that is loaded
- registered: 10,000 soft prompts in one folder, asked for at random, 32 MB of them loaded

Writes DATE-serving.json into benchmarks/results/ (benchmarks/serving_table.py makes tables of it). Exit code 1 where
one of our answers was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import results
import serving_scale
import torch
from measure import digits, median_rate, summary
from serving_load import Answer, Call, Client, Round, percentiles
from serving_opponents import Peft, Plain, said_label
from serving_ours import (
    Ask,
    Gateway,
    Setting,
    end_kindly,
    held,
    names,
    prepare,
    right_probabilities,
    right_text,
    verdict,
    write_prompts,
)

SECTIONS = ("throughput", "ratio", "classify", "memory", "registered")
SIDE_BY_SIDE = ("throughput", "ratio", "classify")
BASE = "base"
"""The plain model's name in the API."""
STREAMED = " streamed"
"""Behind an engine's name: the same with answers token by token."""
RATIO_PROMPTS = 8
PAIRS = 2
"""Rounds of the ratio for each of the others: it is near 1, so it wants more of them."""
IDLE_SECONDS = 2.0
"""Time in which an engine that nobody asks should leave the processors to the others."""
CLOSE = 1e-4
"""Largest difference of a label probability from the library's."""
PACKAGES = ("uvicorn", "starlette", "httpx")

Work = Callable[[Sequence[Ask]], Round]


@dataclass(frozen=True)
class Served:
    """One way to ask a gateway.

    ``streams``: completions come token by token; ``base``: everything is asked of the plain model.
    """

    client: Client
    gateway: Gateway
    setting: Setting
    tokens: int
    streams: bool = False
    base: bool = False

    def complete(self, asks: Sequence[Ask]) -> Round:
        """The texts of all requests, all under way at once."""
        return self._sent(asks, "/v1/completions", self._completion)

    def classify(self, asks: Sequence[Ask]) -> Round:
        """Label probabilities of all requests, all under way at once."""
        return self._sent(asks, "/v1/classify", lambda ask: {"model": ask.prompt, "input": ask.text})

    def _completion(self, ask: Ask) -> dict[str, Any]:
        body = {
            "model": BASE if self.base else ask.prompt, "prompt": self.setting.rendered(ask.text),
            "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if self.streams else {})

    def _sent(self, asks: Sequence[Ask], path: str, body: Callable[[Ask], dict[str, Any]]) -> Round:
        found = self.client.run(self.gateway.url, [Call(path, body(ask)) for ask in asks], len(asks))
        for answer in found.answers:
            if answer.error or (path == "/v1/completions" and answer.tokens != self.tokens):
                raise RuntimeError(f"{path} answered {answer}\n{self.gateway.said()}")
        return found


@dataclass(frozen=True)
class Bench:
    """What the sections that run side by side share."""

    args: argparse.Namespace
    setting: Setting
    folder: Path
    client: Client
    gateways: Mapping[str, Gateway]
    prompts: Sequence[str]
    """Names of all soft prompts, as many as the largest mix has."""

    def served(self, engine: str, **how: bool) -> Served:
        """A way to ask the gateway on this engine."""
        return Served(self.client, self.gateways[engine], self.setting, self.args.new_tokens, **how)

    def peft(self, count: int) -> Peft:
        """PEFT with so many adapters."""
        return Peft(self.setting, self.folder, self.prompts[:count], self.args.new_tokens)


def take_turns(
    works: Mapping[str, Work], draw: Callable[[int], Sequence[Ask]], rounds: int, warm: int, count: int
) -> dict[str, tuple[list[Ask], list[Round]]]:
    """Rounds of every contender in turns, each on requests of its own: the requests of the last round, and all rounds.

    A first round of ``warm`` requests is dropped; who begins moves on with every round.
    """
    order = list(works)
    found: dict[str, tuple[list[Ask], list[Round]]] = {}
    for name, work in works.items():
        work(draw(warm))
        found[name] = ([], [])
    for turn in range(rounds):
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            asks = list(draw(count))
            found[name] = (asks, [*found[name][1], works[name](asks)])
    return found


def figures(rounds: Sequence[Round], by_token: bool) -> dict[str, Any]:
    """Times and rates of a contender's rounds; ``by_token``: when each token came is known."""
    seconds = [r.seconds for r in rounds]
    answers = [a for r in rounds for a in r.answers]
    tokens = [sum(a.tokens for a in r.answers) for r in rounds]
    found: dict[str, Any] = {
        "round": summary(seconds),
        "requests_per_s": median_rate([len(r.answers) for r in rounds], seconds),
        "latency_ms": percentiles([a.ended - a.began for a in answers]),
    }
    if any(tokens):
        found["tokens_per_s"] = median_rate(tokens, seconds)
    if by_token:
        found["first_token_ms"] = percentiles([a.pieces[0] - a.began for a in answers if a.pieces])
        found["between_tokens_ms"] = percentiles(list(gaps(answers)))
    return found


def gaps(answers: Sequence[Answer]) -> Iterator[float]:
    """Seconds between two pieces of one answer."""
    for answer in answers:
        yield from (b - a for a, b in pairwise(answer.pieces))


def throughput(bench: Bench) -> dict[str, Any]:
    """64 concurrent requests over each number of soft prompts, and how many times as fast we are."""
    section: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for count in bench.args.mixes:
        works: dict[str, Work] = {"peft": bench.peft(count).complete}
        for engine in bench.gateways:
            works[engine] = bench.served(engine).complete
            works[engine + STREAMED] = bench.served(engine, streams=True).complete
        if count == bench.args.mixes[0]:
            works["plain"] = Plain(bench.setting, bench.args.new_tokens).complete
        found = turns(bench, works, count)
        mix = {name: timed(bench, name, *found[name]) for name in works}
        times = {name: mix[name]["round"]["median_s"] for name in works}
        section[str(count)] = mix
        ratios[str(count)] = {n: digits(times["peft"] / s, 3) for n, s in times.items() if is_ours(bench, n)}
        print(f"throughput, {count} soft prompts: {times}", flush=True)
    memory = {engine: mb(gateway.memory()) for engine, gateway in bench.gateways.items()}
    memory["peft and plain"] = mb(held([psutil.Process()]))
    return {"throughput": section, "throughput_ratio": ratios, "memory_mb": memory}


def timed(bench: Bench, name: str, asks: Sequence[Ask], rounds: Sequence[Round]) -> dict[str, Any]:
    """A contender's figures, and how many of its last answers are those of one-at-a-time generation."""
    by_token = name in ("peft", "plain") or name.endswith(STREAMED)
    checked = [Ask(None, a.text) for a in asks] if name in ("plain", BASE) else list(asks)
    said = [a.text for a in rounds[-1].answers]
    step = max(len(checked) // bench.args.check, 1)
    verdicts = [
        verdict(bench.setting, right_text(bench.setting, ask, bench.args.new_tokens), text)
        for ask, text in list(zip(checked, said, strict=True))[::step]
    ]
    return figures(rounds, by_token) | {"answers": {v: verdicts.count(v) for v in ("equal", "tie", "wrong")}}


def turns(bench: Bench, works: Mapping[str, Work], prompts: int) -> dict[str, tuple[list[Ask], list[Round]]]:
    """``take_turns`` with the numbers of the command line."""
    args, mixed = bench.args, bench.prompts[:prompts]
    return take_turns(works, lambda n: bench.setting.asks(n, mixed), args.rounds, args.warm, args.concurrent)


def is_ours(bench: Bench, name: str) -> bool:
    """Whether a contender is one of our engines."""
    return name.removesuffix(STREAMED) in bench.gateways


def ratio(bench: Bench) -> dict[str, Any]:
    """The plain base and mixed soft prompts through the same engine, by turns on the same messages."""
    args, section = bench.args, {}
    mixed = bench.prompts[:RATIO_PROMPTS]
    for engine in bench.gateways:
        works: dict[str, Work] = {
            BASE: bench.served(engine, base=True).complete,
            "mixed": bench.served(engine).complete,
        }
        found = take_turns(
            works, lambda n: bench.setting.asks(n, mixed), PAIRS * args.rounds, args.warm, args.concurrent
        )
        both = {name: timed(bench, name, *found[name]) for name in works}
        pairs = [a.seconds / b.seconds for a, b in zip(found[BASE][1], found["mixed"][1], strict=True)]
        whole = both[BASE]["round"]["median_s"] / both["mixed"]["round"]["median_s"]
        spread = {k: v for k, v in summary(pairs).items() if k != "median_s"}
        section[engine] = both | {"ratio": digits(whole, 3), "pairs": spread}
        print(f"ratio, {engine}: {section[engine]['ratio']} of the plain base, round by round {spread}", flush=True)
    return {"ratio": section, "ratio_text_tokens": text_tokens(bench)}


def text_tokens(bench: Bench) -> dict[str, float]:
    """Tokens of a round's contexts, without virtual ones: fewest, mean, most."""
    asks = bench.setting.asks(bench.args.concurrent, [None])
    lengths = [len(bench.setting.context(ask)) for ask in asks]
    return {"min": min(lengths), "mean": digits(sum(lengths) / len(lengths)), "max": max(lengths)}


def classify(bench: Bench) -> dict[str, Any]:
    """64 concurrent classifications over 8 soft prompts, and how many times as fast we are."""
    peft = bench.peft(RATIO_PROMPTS)
    works: dict[str, Work] = {"peft": peft.classify, "peft guide": peft.classify_as_in_guide}
    works |= {engine: bench.served(engine).classify for engine in bench.gateways}
    found = turns(bench, works, RATIO_PROMPTS)
    section: dict[str, Any] = {}
    task = bench.setting.task
    labels = dict(zip(task.classes, task.words, strict=True))
    for name, (asks, rounds) in found.items():
        section[name] = figures(rounds, by_token=False)
        if name in bench.gateways:
            section[name]["largest_difference"] = largest_difference(bench, asks, rounds[-1].answers)
        else:
            said = [said_label(labels, a.text) is not None for a in rounds[-1].answers]
            section[name]["labels_said"] = digits(sum(said) / len(said), 3)
    times = {name: figure["round"]["median_s"] for name, figure in section.items()}
    print(f"classify: {times}", flush=True)
    ratios = {e: {o: digits(times[o] / times[e], 3) for o in ("peft", "peft guide")} for e in bench.gateways}
    return {"classify": section, "classify_ratio": ratios}


def largest_difference(bench: Bench, asks: Sequence[Ask], answers: Sequence[Answer]) -> float:
    """Of a sample's label probabilities from the library's."""
    step = max(len(asks) // bench.args.check, 1)
    worst = 0.0
    for ask, answer in list(zip(asks, answers, strict=True))[::step]:
        said = answer.reply["data"][0]["probabilities"]
        right = zip(bench.setting.task.classes, right_probabilities(bench.setting, ask), strict=True)
        worst = max(worst, *(abs(said[name] - p) for name, p in right))
    return float(f"{worst:.2g}")


def mb(sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes as MB (1e6)."""
    return {key: digits(size / 1e6) for key, size in sizes.items()}


def wrong(result: Mapping[str, Any]) -> list[str]:
    """Where an answer of ours was not what the library says."""
    engines = result["engines"]
    texts = {f"throughput, {mix}, {n}": f for mix, found in result.get("throughput", {}).items()
             for n, f in found.items() if n.removesuffix(STREAMED) in engines}  # fmt: skip
    texts |= {f"ratio, {e}, {n}": found[n] for e, found in result.get("ratio", {}).items() for n in (BASE, "mixed")}
    texts |= {"registered": result["registered"]} if "registered" in result else {}
    scored = {f"classify, {e}": result["classify"][e] for e in engines if "classify" in result}
    return [place for place, figure in texts.items() if figure["answers"]["wrong"]] + [
        place for place, figure in scored.items() if figure["largest_difference"] > CLOSE
    ]


def side_by_side(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """The sections in which all contenders are there at once."""
    wanted = [s for s in args.sections if s in SIDE_BY_SIDE]
    if not wanted:
        return {}
    prompts = names(max(*args.mixes, RATIO_PROMPTS))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        write_prompts(setting, Path(place), prompts)
        gateways = {e: stack.enter_context(gateway(args, e, Path(place))) for e in engines(args)}
        found["start_s"] = {e: digits(g.start_s, 3) for e, g in gateways.items()}
        print(f"gateways ready after {found['start_s']} s", flush=True)
        bench = Bench(args, setting, Path(place), stack.enter_context(Client()), gateways, prompts)
        for name in wanted:
            found |= {"throughput": throughput, "ratio": ratio, "classify": classify}[name](bench)
        found["idle_cpu"] = {engine: digits(g.idle_cpu(IDLE_SECONDS), 3) for engine, g in gateways.items()}
    return found


def gateway(args: argparse.Namespace, engine: str, prompts: Path, *more: str) -> Gateway:
    """``foreword serve`` on an engine."""
    options = ["--name", BASE, "--engine", engine, "--dtype", "float32", "--kv-memory", str(args.kv_memory), *more]
    if engine == "vllm":
        options += ["--vllm-python", args.vllm]
    return Gateway(args.model, prompts, args.threads, options)


def engines(args: argparse.Namespace) -> list[str]:
    """Our engines in this run."""
    return [*([] if args.no_transformers else ["transformers"]), *(["vllm"] if args.vllm else [])]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run, as the results file holds them."""
    torch.set_num_threads(args.threads)
    setting = prepare(args.model, args.data, args.text, args.label, args.virtual_tokens, args.split)
    found: dict[str, Any] = {
        **results.facts(torch.device("cpu")), "kind": "serving", "dtype": "float32", "seed": setting.seed,
        "model": results.data_name(args.model), "rows": results.data_name(args.data), "engines": engines(args),
        "virtual_tokens": args.virtual_tokens, "new_tokens": args.new_tokens, "concurrent": args.concurrent,
        "rounds": args.rounds, "checked": args.check,
    }  # fmt: skip
    found["versions"] |= {name: version(name) for name in PACKAGES}
    found |= side_by_side(args, setting)
    start = partial(gateway, args, engines(args)[0])
    if "memory" in args.sections:
        found |= serving_scale.measure_memory(setting, start, args.loads)
    if "registered" in args.sections:
        found |= serving_scale.measure_registered(setting, start, args)
    return found | {"wrong": wrong(found)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument("--data", default="bundled:complaints")
    made.add_argument("--split", default="test")
    made.add_argument("--text", default="text", help="input column")
    made.add_argument("--label", default="label", help="label column")
    made.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    made.add_argument("--vllm", default="", metavar="PYTHON", help="of vLLM's environment; without it vLLM is left out")
    made.add_argument("--no-transformers", action="store_true", help="leave the embedded engine out")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every contender")
    made.add_argument("--rounds", type=int, default=3, help="timed rounds of every contender, after one to warm up")
    made.add_argument("--warm", type=int, default=32, help="requests of the round that warms up")
    made.add_argument("--mixes", type=int, nargs="+", default=[1, 8, 64], help="numbers of soft prompts")
    made.add_argument("--concurrent", type=int, default=64)
    made.add_argument("--virtual-tokens", type=int, default=16)
    made.add_argument("--new-tokens", type=int, default=32)
    made.add_argument("--check", type=int, default=8, help="answers of every contender that are checked")
    made.add_argument("--loads", type=int, nargs="+", default=[10, 1000, 2000], help="soft prompts loaded, for memory")
    made.add_argument("--registered", type=int, default=10_000, help="soft prompts in the folder")
    made.add_argument("--requests", type=int, default=2000, help="sent to them")
    made.add_argument("--kv-memory", type=int, default=1024, help="MB of the engines' cache of keys and values")
    made.add_argument("--prompt-memory", type=int, default=32, help="MB of them loaded at once")
    made.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results")
    made.add_argument("--name", default="", help="added to the file's name; without it a day has one file")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the file and prints it as tables; 1 where an answer of ours was wrong."""
    from serving_table import page

    args = parser().parse_args(argv)
    found = run(args)
    path = results.write(found, args.out, args.name)
    print("\n".join(page([found | {"file": path.name}])))
    print(f"wrote {path.name}")
    for place in found["wrong"]:
        print(f"wrong answers: {place}", file=sys.stderr)
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    end_kindly()
    raise SystemExit(main())
