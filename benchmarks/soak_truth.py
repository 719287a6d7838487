"""What the soak knows beforehand: every right answer, and what a name may stand for while it is being switched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving_load import Answer
from serving_ours import TIE, Ask, Setting, right_probabilities, right_text

BASE = "base"
"""The plain model's name."""
ALTERNATIVES = "other"
"""Folder in the store with the other content of every name."""
CLOSE = 1e-4


@dataclass(frozen=True)
class Expected:
    """What one content says of one text."""

    text: str
    probabilities: Mapping[str, float]


@dataclass
class Name:
    """What a soft prompt's name may stand for now: contents, or None where it is unloaded."""

    name: str
    answers: Mapping[str, Mapping[str, Expected]]
    """By text, then by content."""
    contents: tuple[str, str]
    current: str | None
    _allowed: set[str | None] = field(default_factory=set)
    _watching: list[set[str | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._allowed = {self.current}

    @contextmanager
    def watched(self) -> Iterator[set[str | None]]:
        """All that the name may have stood for at any time inside the block."""
        seen = set(self._allowed)
        self._watching.append(seen)
        try:
            yield seen
        finally:
            self._watching = [s for s in self._watching if s is not seen]

    @contextmanager
    def changing(self, content: str | None) -> Iterator[None]:
        """Inside the block it may stand for either; afterwards for the new content alone."""
        for seen in (self._allowed, *self._watching):
            seen.add(content)
        yield
        self.current, self._allowed = content, {content}


def precomputed(setting: Setting, prompts: Sequence[str], texts: int, tokens: int) -> list[Name]:
    """All right answers, one at a time. Where two tokens are as good as equally likely, there is none: left out."""
    said = setting.messages[:texts]
    found = []
    for at, name in enumerate([*prompts, BASE]):
        contents = (name, f"{name} {ALTERNATIVES}") if name != BASE else (BASE, BASE)
        clear: dict[str, dict[str, Expected]] = {}
        for text in said:
            right = {c: expected(setting, Ask(c if c != BASE else None, text), tokens) for c in contents}
            if kept := {c: e for c, e in right.items() if e is not None}:
                clear |= {text: kept} if len(kept) == len(right) else {}
        if not clear:
            raise RuntimeError(f"no text has a clear answer with soft prompt {name}")
        found.append(Name(name, clear, contents, name))
        if at % 10 == 9:
            print(f"right answers of {at + 1} soft prompts of {len(prompts)}", flush=True)
    return found


def expected(setting: Setting, ask: Ask, tokens: int) -> Expected | None:
    """The right answer to one request; None where it hangs on rounding."""
    right = right_text(setting, ask, tokens)
    if min(right.gaps) < TIE:
        return None
    text = setting.backbone.tokenizer.decode(right.ids, skip_special_tokens=True)
    probabilities = dict(zip(setting.task.classes, right_probabilities(setting, ask), strict=True))
    return Expected(text, probabilities)


def is_right(kind: str, answer: Answer, right: Expected) -> bool:
    """Whether an answer is this one."""
    if kind != "classify":
        return answer.text == right.text
    said = answer.reply["data"][0]["probabilities"]
    return all(abs(float(said[c]) - p) <= CLOSE for c, p in right.probabilities.items())
