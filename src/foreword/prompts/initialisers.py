"""Initialisers: closures that make the first rows of a soft prompt, ``[n, H]`` in float32.

They compose: ``vocabulary + classes:4`` puts four class-label rows after vocabulary rows.
Lester et al. 2021 (arXiv 2104.08691, section 3.2) compare random, sampled-vocabulary and
class-label initialisation; text initialisation is PEFT's TEXT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch

from foreword.errors import ForewordError

Embed = Callable[[Sequence[int]], torch.Tensor]
"""Token ids -> their embeddings ``[n, H]`` as the model reads them."""
Initialiser = Callable[[int], torch.Tensor]
"""Number of rows ``n`` -> rows ``[n, H]``."""

NAMES = ("text", "classes", "vocabulary", "random", "adapter", "zero", "peft-random")
FREQUENT = 5000
"""Byte-pair vocabularies are sorted by merge rank, so their first ids are the frequent ones
(the paper samples the 5,000 most common tokens)."""
_PART = re.compile(r"\s*([a-z-]+)(?::(\d+))?\s*")


def from_text(ids: Sequence[int], embed: Embed) -> Initialiser:
    """A text's embeddings, tiled when shorter than ``n`` and cut when longer, as PEFT does."""
    if not ids:
        raise ForewordError("the text has no tokens", "key prompt.init_text", "give a text")
    return lambda n: embed([ids[i % len(ids)] for i in range(n)])


def from_class_words(words: Sequence[Sequence[int]], embed: Embed) -> Initialiser:
    """One row a class: the mean embedding of its label words, tiled over the classes."""
    if not words:
        raise ForewordError("there are no classes to start from", "key prompt.init", "init=text or vocabulary")
    return lambda n: torch.stack([embed(words[i % len(words)]).mean(0) for i in range(n)])


def from_vocabulary(candidates: Sequence[int], embed: Embed, generator: torch.Generator) -> Initialiser:
    """Embeddings of frequent ordinary tokens, sampled without replacement where there are enough."""

    def rows(n: int) -> torch.Tensor:
        order = torch.randperm(len(candidates), generator=generator).tolist()
        return embed([candidates[order[i % len(order)]] for i in range(n)])

    return rows


def from_random(sample: torch.Tensor, generator: torch.Generator) -> Initialiser:
    """Gaussian rows with the norm of real embeddings, taken from ``sample`` ``[m, H]``."""
    norm = float(sample.norm(dim=1).mean())

    def rows(n: int) -> torch.Tensor:
        noise = torch.randn(n, sample.shape[1], generator=generator)
        return torch.nn.functional.normalize(noise, dim=1) * norm

    return rows


def peft_random(width: int, generator: torch.Generator) -> Initialiser:
    """PEFT's default, N(0, 1): about 50 times the norm of real embeddings. Only by name."""
    return lambda n: torch.randn(n, width, generator=generator)


def from_rows(rows: torch.Tensor) -> Initialiser:
    """The rows of another soft prompt ``[P, H]``, tiled or cut to ``n``."""
    return lambda n: rows.float()[torch.arange(n) % rows.shape[0]].clone()


def from_prefix(values: torch.Tensor, n: int) -> torch.Tensor:
    """The first ``n`` tokens of another prefix ``[P, W]``: keys know their place and cannot be tiled."""
    if n > len(values):
        raise ForewordError(
            f"the adapter has {len(values)} virtual tokens, {n} are asked for",
            "key prompt.virtual_tokens",
            "prompt.virtual_tokens=0 takes as many as it has",
        )
    return values[:n].float().clone()


def compose(parts: Sequence[tuple[Initialiser, int]]) -> Initialiser:
    """Rows of several initialisers one after the other; a size of 0 takes what the others leave."""

    def rows(n: int) -> torch.Tensor:
        rest = n - sum(size for _, size in parts)
        return torch.cat([make(size or rest) for make, size in parts])

    return rows


def parse_init(text: str, virtual_tokens: int) -> list[tuple[str, int]]:
    """``"vocabulary+classes:4"`` -> ``[("vocabulary", 0), ("classes", 4)]``.

    Raises:
        ForewordError: an unknown name, or sizes that do not add up to ``virtual_tokens``.
    """
    parts = []
    for piece in text.split("+"):
        match = _PART.fullmatch(piece)
        if match is None or match.group(1) not in NAMES:
            raise ForewordError(
                f"unknown initialiser '{piece.strip()}'", f"prompt.init={text}", f"known: {', '.join(NAMES)}"
            )
        parts.append((match.group(1), int(match.group(2) or 0)))
    fixed, open_parts = sum(size for _, size in parts), sum(1 for _, size in parts if size == 0)
    fits = fixed < virtual_tokens if open_parts == 1 else fixed == virtual_tokens and open_parts == 0
    fits = fits or (virtual_tokens == 0 and open_parts == len(parts) == 1)  # as many as its source has
    if not fits:
        raise ForewordError(
            f"the parts do not add up to {virtual_tokens} virtual tokens",
            f"prompt.init={text}",
            "give every part but one its size, as in vocabulary+classes:4",
        )
    return parts


def frequent_ids(vocab: Mapping[str, int], special: Sequence[int], limit: int, most: int = FREQUENT) -> list[int]:
    """Ids of frequent ordinary tokens: the lowest ids that are words, without specials."""
    refused = set(special)
    words = sorted(i for t, i in vocab.items() if i < limit and i not in refused and _ordinary(t))
    return words[:most]


def _ordinary(token: str) -> bool:
    bare = token.lstrip("Ġ▁ ")
    return len(bare) > 1 and bare.isalpha()
