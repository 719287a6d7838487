"""What a student learns a long text by: things that come after it, as the model that read it continues them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from foreword.backbone.choose import Layout
from foreword.backbone.generate import BATCH, Sampling, generate
from foreword.backbone.load import Backbone
from foreword.config import DistillConfig
from foreword.data.encode import Encoder
from foreword.errors import ForewordError
from foreword.evaluation.agreement import candidates, softened
from foreword.evaluation.scoring import Floats, classify
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Segment

OPENINGS = (
    "\n\nQuestion:", "\n\nSummary:", "\n\nIn short,", "\n\nThe main point is that", "\n\nFor example,",
    "\n\nWhat does it say about", "\n\nList of the names and numbers in the text:", "\n\nAs the text says,",
)  # fmt: skip
"""Plain beginnings that the teacher goes on from, in turn with pieces of the text (self-study, arXiv 2506.06266)."""
PIECES = (8, 32)
"""Tokens of a piece of the text, from and below."""


@dataclass(frozen=True)
class Study:
    """Rows for training with the teacher's targets, and rows held out; contexts without virtual ids."""

    train: list[Segment]
    held_out: list[Example]


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
        ForewordError: it is not there, not UTF-8, or empty.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ForewordError(f"cannot read the text: {e}", path, "give a text file in UTF-8") from None
    if not text.strip():
        raise ForewordError("the text is empty", path, "give a text file with something in it")
    return text


def self_study(
    backbone: Backbone, teacher: SoftPrompt, text_ids: Sequence[int], opening: tuple[int, ...], config: DistillConfig,
    seed: int, layout: Layout,
) -> Study:  # fmt: skip
    """Pieces of the text and plain openings, each with what the teacher writes after it.

    A fifth of them is held out, to measure on what was not trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    # As every later request will: with the opening (BOS) that the tokenizer puts before a text.
    contexts = [(*opening, *ids) for ids in _beginnings(backbone, text_ids, config.queries, generator)]
    segments: list[Segment] = []
    for at in range(0, len(contexts), BATCH):
        batch = contexts[at : at + BATCH]
        sampling = Sampling(max_new_tokens=config.answer_tokens, temperature=1.0, seed=seed + at)
        written = generate(backbone, teacher, batch, sampling)
        segments += [
            Segment(c, ((*ids, backbone.end_id)[: config.answer_tokens],))
            for c, ids in zip(batch, written, strict=True)
        ]
    cut = fifth(len(segments))
    found = candidates(backbone, teacher, segments[cut:], config.candidates, layout)
    held = [Example(i + 1, s.context, s.branches[0]) for i, s in enumerate(segments[:cut])]
    return Study(list(softened(segments[cut:], found)), held)


def longest_row(backbone: Backbone, config: DistillConfig) -> int:
    """Most tokens of a row of self-study."""
    openings = [len(backbone.tokenizer(o, add_special_tokens=False)["input_ids"]) for o in OPENINGS]
    return max(*openings, PIECES[1]) + 1 + config.answer_tokens


def fifth(rows: int) -> int:
    """How many of the rows are held out when none are given for that."""
    return max(1, rows // 5)


def of_rows(
    backbone: Backbone,
    teacher: SoftPrompt,
    examples: Sequence[Example],
    encoder: Encoder,
    config: DistillConfig,
    layout: Layout,
) -> Iterator[Segment]:
    """Rows with the teacher's targets: its class probabilities, or its likeliest tokens along the row's own target."""
    if not encoder.label_ids:
        segments = [Segment(e.context, (e.target,)) for e in examples]
        yield from softened(segments, candidates(backbone, teacher, segments, config.candidates, layout))
        return
    table = classify(backbone, teacher, [e.context for e in examples], encoder.label_ids, layout)
    for example, row in zip(examples, table, strict=True):
        yield class_targets(example.context, encoder.label_ids, row)


def class_targets(context: tuple[int, ...], label_ids: Sequence[tuple[int, ...]], probabilities: Floats) -> Segment:
    """A segment that says each class with its probability ``[C]``.

    The likeliest class's words are read; at each of their places stand the tokens of all classes that
    begin alike, by the share of the probability that is left there.
    """
    best = label_ids[int(probabilities.argmax())]
    soft = []
    for i in range(len(best)):
        shares: dict[int, float] = {}
        for ids, p in zip(label_ids, probabilities.tolist(), strict=True):
            if ids[:i] == best[:i] and len(ids) > i:
                shares[ids[i]] = shares.get(ids[i], 0.0) + p
        total = sum(shares.values())
        soft.append((tuple(shares), tuple(share / total for share in shares.values())))
    return Segment(context, (best,), tuple(soft))


def in_front(segments: Sequence[Segment], virtual: Sequence[int]) -> list[Segment]:
    """The same segments with virtual ids in front of their contexts."""
    return [replace(s, context=(*virtual, *s.context)) for s in segments]


def _beginnings(
    backbone: Backbone, text_ids: Sequence[int], count: int, generator: torch.Generator
) -> Iterator[tuple[int, ...]]:
    """Openings and pieces of the text in turn."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, max(high, low + 1), (), generator=generator))

    for i in range(count):
        if i % 2:
            yield tuple(backbone.tokenizer(OPENINGS[i // 2 % len(OPENINGS)], add_special_tokens=False)["input_ids"])
        else:
            size = min(draw(*PIECES), len(text_ids))
            at = draw(0, len(text_ids) - size + 1)
            yield tuple(text_ids[at : at + size])
