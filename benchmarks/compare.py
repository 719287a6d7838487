"""What got slower between two results: Foreword's times, new against old. Exit code 1 if any did.

    .venv/bin/python benchmarks/compare.py [OLD.json NEW.json]

Without files: the newest result and the one before it of the same kind, model, rows and type.

Machines are shared, so yesterday's seconds are not today's. Both files timed PEFT's guide in the
same minutes as Foreword, and PEFT did not change: new times are multiplied by PEFT's old median
over its new one, which takes the machine's speed out. The verdict is on those normalised times;
raw ones are printed beside them, and decide only where a file has no opponent's time.

Noise is the runs' own spread between quartiles: slower means that three quarters of the new runs
are above three quarters of the old ones (new q1 > old q3), faster the other way round. Results
without quartiles (the first format) are judged by their extremes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import FOLDER, Result, comparable, newest, read

OURS = "foreword"
OPPONENT = {"train_step": "guide", "scoring": "guide", "two_class_scoring": "per-class", "guide_job": "guide"}
"""The sections compared, and whose time in each stands for the machine's speed."""


@dataclass(frozen=True)
class Change:
    """One of Foreword's times, new against old."""

    name: str
    old_s: float
    new_s: float
    scale: float | None
    """The opponent's old median over its new one; None where a file lacks it."""
    verdict: str
    """slower, faster or same."""

    @property
    def raw(self) -> float:
        """Change of the median in percent; positive is slower."""
        return 100 * (self.new_s / self.old_s - 1)

    @property
    def normalised(self) -> float | None:
        """The same with the machine's speed taken out."""
        return None if self.scale is None else 100 * (self.new_s * self.scale / self.old_s - 1)


def compare(old: Result, new: Result) -> list[Change]:
    """Every time of Foreword that both results hold."""
    before = {(r.get("model"), r["virtual_tokens"]): r for r in old["results"]}
    changes = []
    for now in new["results"]:
        then = before.get((now.get("model"), now["virtual_tokens"]), {})
        for section, opponent in OPPONENT.items():
            if OURS in then.get(section, {}) and OURS in now.get(section, {}):
                words = [section.replace("_", " "), now.get("model"), f"P = {now['virtual_tokens']}"]
                name = ", ".join(filter(None, words))
                changes.append(change(name, then[section], now[section], opponent))
    return changes


def change(name: str, old: Mapping[str, Any], new: Mapping[str, Any], opponent: str) -> Change:
    """Foreword's times in one section: ``{contender: summary}`` old and new."""
    then, now = old[OURS], new[OURS]
    scale = old[opponent]["median_s"] / new[opponent]["median_s"] if opponent in old and opponent in new else None
    (then_low, then_high), (now_low, now_high) = spread(then), spread(now)
    factor = 1.0 if scale is None else scale
    slower, faster = now_low * factor > then_high, now_high * factor < then_low
    verdict = "slower" if slower else "faster" if faster else "same"
    return Change(name, then["median_s"], now["median_s"], scale, verdict)


def spread(summary: Mapping[str, float]) -> tuple[float, float]:
    """First and third quartile in seconds, or the extremes where those are not kept."""
    return summary.get("q1", summary["min"]), summary.get("q3", summary["max"])


TIMED = ("cpu", "gpu")
"""Kinds of results that hold times of the same sections; others measure scores or servers."""


def pair(folder: Path, kind: str | None) -> tuple[Result, Result] | None:
    """The newest result and the newest before it that it can be compared with, as (old, new)."""
    found = [r for r in newest(folder, kind) if r["kind"] in TIMED]
    for earlier in found[1:]:
        if comparable(earlier, found[0]):
            return earlier, found[0]
    return None


def show(old: Result, new: Result, changes: Sequence[Change]) -> None:
    """The comparison as lines of text."""
    print(f"{old['file']} -> {new['file']}: {new['model']}, {new['row_count']} rows of {new['rows']}")
    if old["machine"] != new["machine"]:
        print("the machines differ: read normalised figures only")
    print(f"{'':40}{'old s':>10}{'new s':>10}{'raw':>9}{'normalised':>12}")
    for c in changes:
        normalised = "-" if c.normalised is None else f"{c.normalised:+.1f} %"
        raw = f"{c.raw:+.1f} %"
        print(f"{c.name:40}{c.old_s:>10.4g}{c.new_s:>10.4g}{raw:>9}{normalised:>12}  {c.verdict}")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison; 1 when something got slower, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="OLD NEW")
    parser.add_argument("--kind", choices=("cpu", "gpu"), help="default: that of the newest result")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder to look in")
    args = parser.parse_args(argv)
    if len(args.files) not in (0, 2):
        parser.error("give two files, the old and the new, or none")
    found = (read(args.files[0]), read(args.files[1])) if args.files else pair(args.results, args.kind)
    if found is None:
        print("nothing to compare: there are no two results of the same kind, model, rows and type")
        return 0
    old, new = found
    if not comparable(old, new):
        parser.error(f"{old['file']} and {new['file']} were not measured on the same kind, model, rows and type")
    changes = compare(old, new)
    show(old, new, changes)
    return int(any(c.verdict == "slower" for c in changes))


if __name__ == "__main__":
    raise SystemExit(main())
