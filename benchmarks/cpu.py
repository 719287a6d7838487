"""Foreword against PEFT on the CPU, in float32: the same rows, backbone, precision and machine.

    .venv/bin/python benchmarks/cpu.py [--data train.csv --text "Tweet text" --label Label]

Contenders alternate batch by batch in one process; figures are medians with their spread.
Writes DATE-cpu.json into benchmarks/results/; docs/speed.md is made from it (benchmarks/table.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from results import FOLDER, write
from suite import parser, run


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures, prints a line a size of soft prompt, and returns the file written."""
    options = parser(__doc__)
    options.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    options.add_argument("--name", default="", help="added to the file's name; without it a day has one file")
    args = options.parse_args(argv)
    result = run(args, "cpu", "float32")
    for figures in result["results"]:
        print(json.dumps({k: v for k, v in figures.items() if k.endswith(("ratio", "tokens"))}))
    path = write(result, args.out, args.name)
    print(f"wrote {path.name}")
    return path


if __name__ == "__main__":
    main()
