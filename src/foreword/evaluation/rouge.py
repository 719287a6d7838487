"""ROUGE-L: the longest common subsequence of words, as an F-measure.

Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1 (aclanthology.org/W04-1013), with
beta = 1 and without stemming, as the package rouge-score has it by default; words are those of any script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F-measure in [0, 1] against the reference that is nearest; 0 for a text without words."""
    said = words(text)
    return max(f_measure(said, words(r)) for r in references)


def words(text: str) -> list[str]:
    """Runs of letters and digits, whatever their case."""
    return _WORD.findall(text.casefold())


def f_measure(said: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the common subsequence: ``2 LCS / (n + m)``."""
    total = len(said) + len(reference)
    return 2 * common_subsequence(said, reference) / total if total else 0.0


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the usual table as the bits of one number.

    Hyyro 2004, "Bit-parallel LCS-length computation revisited": a zero bit is a step of the row.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & full
    return len(a) - row.bit_count()
