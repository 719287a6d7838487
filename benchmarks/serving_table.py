"""Tables of the newest serving benchmark and the newest soak, in Markdown.

.venv/bin/python benchmarks/serving_table.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from results import FOLDER, Result, newest
from table import number, spread, table, verdict

STREAMED = " streamed"
CONTENDERS = {
    "peft": ("PEFT", "`set_adapter` and `generate`, grouped by adapter, batches of 8, in process"),
    "peft guide": ("PEFT, 10 tokens", "the same with the 10 new tokens of PEFT's guide"),
    "plain": ("transformers, no soft prompt", "`generate` of the base alone in batches of 8, in process"),
    "transformers": ("**Foreword, transformers engine**", "`foreword serve`, asked over HTTP"),
    "vllm": ("**Foreword, vLLM engine**", "`foreword serve --engine vllm`, asked over HTTP"),
}
"""Name and description of each contender, in the order of the tables."""
MUST: dict[str, tuple[float, float]] = {"transformers": (3, 5), "vllm": (5, 8)}
"""Throughput over PEFT's that the project promises: must and aim."""
GOAL_MIX = "8"
RATIO, CLASSIFY, MEMORY = (0.9, 0.97), (5, 10), (1.1, 1.1)
GROWTH = 0.05
HOW = """\
Everything ran side by side in one run, contenders in turns. The gateway's client is a process of its own that speaks
HTTP; PEFT and transformers answer in process. Figures are medians [minimum, maximum] over rounds; **x** is how many
times as fast as PEFT."""


def page(found: Sequence[Result]) -> list[str]:
    """All tables of these results, serving and soak; sections a result lacks are left out."""
    lines: list[str] = []
    for result in found:
        lines += [*(soak(result) if result["kind"] == "soak" else serving(result)), ""]
    return lines


def serving(result: Result) -> Iterator[str]:
    """One serving benchmark."""
    machine = result["machine"]
    yield f"{result['date']}; {machine['cpu']}, threads {machine['threads']}; {result['model']} in {result['dtype']},"
    yield f"soft prompts of {result['virtual_tokens']} rows, {result['concurrent']} concurrent requests,"
    yield f"{result['new_tokens']} new tokens, {result['rounds']} rounds;"
    yield f"[{result['file']}](../benchmarks/results/{result['file']});"
    yield ", ".join(f"{name} {release}" for name, release in result["versions"].items()) + "."
    yield ""
    yield from HOW.splitlines()
    yield from goals(result)
    yield from throughput(result)
    yield from ratio(result)
    yield from classify(result)
    yield from memory(result)
    yield from registered(result)


def name_of(contender: str) -> str:
    """In words."""
    name = CONTENDERS[contender.removesuffix(STREAMED)][0]
    return f"{name}, streamed" if contender.endswith(STREAMED) else name


def ordered(contenders: Mapping[str, Any]) -> list[str]:
    """Those there, in the order of the tables."""
    known = [name + suffix for name in CONTENDERS for suffix in ("", STREAMED)]
    return [name for name in known if name in contenders]


def goals(result: Result) -> Iterator[str]:
    """What was promised beside what was measured."""
    rows = []
    for engine in result["engines"]:
        figures = [
            (f"tokens/s over {GOAL_MIX} soft prompts, PEFT's times", at(result, "throughput_ratio", GOAL_MIX, engine),
             MUST[engine], False),
            ("mixed soft prompts, of the plain base's throughput", at(result, "ratio", engine, "ratio"), RATIO, False),
            ("classification, PEFT's times", at(result, "classify_ratio", engine, "peft"), CLASSIFY, False),
        ]  # fmt: skip
        if engine == result["engines"][0]:
            held = at(result, "memory", "of_own", "uss")
            figures.append(("memory of a further soft prompt, of its bytes", held, MEMORY, True))
        rows += [
            [name_of(engine), words, number(value), str(must), str(aim), verdict(value, must, aim, small)]
            for words, value, (must, aim), small in figures
            if value is not None
        ]
    yield from table("Against the goals", ["engine", "figure", "measured", "must", "aim", "verdict"], rows)


def at(result: Mapping[str, Any], *keys: str) -> Any:
    """A figure deep in a result; None where the run left it out."""
    found: Any = result
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def throughput(result: Result) -> Iterator[str]:
    """Every mix."""
    rows = []
    for mix, contenders in result.get("throughput", {}).items():
        peft = contenders["peft"]["round"]["median_s"]
        for name in ordered(contenders):
            figure = contenders[name]
            times = number(peft / figure["round"]["median_s"])
            rows.append([
                "0" if name == "plain" else mix, name_of(name), spread(figure["round"], 1.0), times,
                number(figure["tokens_per_s"]), number(figure["requests_per_s"]), pair(figure, "first_token_ms"),
                pair(figure, "between_tokens_ms"), pair(figure, "latency_ms"), right(figure),
            ])  # fmt: skip
    head = ["soft prompts", "contender", "s a round", "x", "tokens/s", "requests/s", "first token ms, p50 / p99",
            "between tokens ms", "whole answer ms", "answers as one at a time"]  # fmt: skip
    yield from table(f"{result['concurrent']} concurrent requests", head, rows)
    sizes = [[name_of(k) if k in CONTENDERS else k, number(v["rss"]), number(v["pss"]), number(v["uss"])]
             for k, v in result.get("memory_mb", {}).items()]  # fmt: skip
    yield from table("Memory after it, MB", ["processes", "resident", "shared divided", "own"], sizes)
    if idle := result.get("idle_cpu"):
        each = ", ".join(f"{name_of(engine)} {share:.2f}" for engine, share in idle.items())
        yield from ("", f"Processors used while others have their turn: {each}.")


def pair(figure: Mapping[str, Any], key: str) -> str:
    """Median and 99th percentile; nothing where it is not known."""
    found = figure.get(key)
    return f"{number(found['p50'])} / {number(found['p99'])}" if found else ""


def right(figure: Mapping[str, Any]) -> str:
    """How many of the answers looked at are those of one-at-a-time generation."""
    verdicts = figure["answers"]
    ties = f" ({verdicts['tie']} at a tie)" if verdicts["tie"] else ""
    return f"{verdicts['equal'] + verdicts['tie']} of {sum(verdicts.values())}{ties}"


def ratio(result: Result) -> Iterator[str]:
    """Mixed soft prompts against the plain base."""
    rows = []
    for engine, both in result.get("ratio", {}).items():
        pairs = both["pairs"]
        each = f"{number(both['ratio'])} [{number(pairs['min'])}, {number(pairs['max'])}]"
        rates = [number(both[name]["tokens_per_s"]) for name in ("base", "mixed")]
        rows.append([name_of(engine), *rates, each, str(pairs["runs"])])
    head = ["engine", "plain base, tokens/s", "8 soft prompts, tokens/s", "ratio", "rounds"]
    yield from table("Mixed soft prompts against the plain base, same texts", head, rows)


def classify(result: Result) -> Iterator[str]:
    """Classification."""
    found = result.get("classify", {})
    rows = []
    for name in ordered(found):
        figure = found[name]
        times = number(found["peft"]["round"]["median_s"] / figure["round"]["median_s"])
        said = (
            f"within {figure['largest_difference']:.1g} of the library's"
            if "largest_difference" in figure
            else f"{figure['labels_said']:.0%} of answers are a label"
        )
        rows.append([name_of(name), spread(figure["round"], 1.0), times, number(figure["requests_per_s"]),
                     pair(figure, "latency_ms"), said])  # fmt: skip
    head = ["contender", "s a round", "x", "requests/s", "whole answer ms, p50 / p99", "answers"]
    yield from table(f"{result['concurrent']} concurrent classifications over 8 soft prompts", head, rows)


def memory(result: Result) -> Iterator[str]:
    """Bytes of further soft prompts."""
    found = result.get("memory", {})
    rows = [[steps, *(str(size[key]) for key in ("rss", "pss", "uss"))]
            for steps, size in found.get("bytes_per_prompt", {}).items()]  # fmt: skip
    title = f"Bytes for a further loaded soft prompt (its own: {found.get('own_bytes')})"
    yield from table(title, ["loaded", "resident", "shared divided", "own"], rows)


def registered(result: Result) -> Iterator[str]:
    """Thousands in one folder."""
    found = result.get("registered")
    if not found:
        return
    words = {"one": "one soft prompt", "even": "all equally often", "zipf": "by Zipf's law"}
    rows = [
        [words[key], str(found[key]["requests"]), str(found[key]["prompts"]), f"{found[key]['hit_rate']:.0%}",
         number(found[key]["requests_per_s"]), pair(found[key], "latency_ms")]
        for key in words
    ]  # fmt: skip
    head = ["asked for", "requests", "soft prompts", "loaded already", "requests/s", "ms, p50 / p99"]
    held = f"{found['prompt_memory_mb']} MB ({found['fit']}) of them loaded"
    yield from table(f"{found['registered']} registered soft prompts, {held}", head, rows)
    yield ""
    yield f"{found['concurrent']} requests at a time, {found['new_tokens']} new tokens each; ready after"
    yield f"{found['start_s']} s, all names listed in {found['list_ms']} ms, {number(found['held_mb']['rss'])} MB"
    yield f"resident; right answers: {right(found)} looked at."


def soak(result: Result) -> Iterator[str]:
    """One soak."""
    grown = result["memory"]["both"]
    met = "met" if not result["wrong"] and grown["growth"] < GROWTH else "**missed**"
    rows = [
        ["requests, answers compared", f"{result['requests']}, {result['compared']}"],
        ["wrong answers", str(result["wrong"])],
        ["failed calls", str(sum(result["errors"].values()))],
        ["answered 404 while unloaded", str(result["unloaded_404"])],
        ["admin's calls", ", ".join(f"{count} {name}" for name, count in sorted(result["admin"].items()))],
        ["soft prompts that made room", f"{result['evictions']:.0f}"],
        ["memory, from the third minute to the end",
         f"{number(grown['mb_before'])} to {number(grown['mb_after'])} MB ({grown['growth']:+.1%})"],
        ["whole answer ms, p50 / p99", pair(result, "latency_ms")],
    ]  # fmt: skip
    title = f"Soak: {result['minutes']:g} minutes, {result['clients']} clients, {result['engine']} engine: {met}"
    yield from table(title, ["figure", "measured"], rows)


def main() -> None:
    """Prints the tables of the newest of each kind."""
    print("# Serving: speed and soak\n")
    print("\n".join(page([found[0] for kind in ("serving", "soak") if (found := newest(FOLDER, kind))])))


if __name__ == "__main__":
    main()
