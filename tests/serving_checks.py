"""What every engine must do, whatever it is made of: each check takes a started engine and a reference.

The reference is the library one request at a time: transformers' ``generate`` and our scoring, float32.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from foreword.backbone.generate import Sampling, generate
from foreword.backbone.load import Backbone
from foreword.evaluation.scoring import score_branches
from foreword.prompts.soft import SoftPrompt
from foreword.serving.engine import Decoding, Engine, EngineError, Request, Rows, ScoreRequest, Token

TIME_LIMIT = 60.0
_ids = itertools.count()


@dataclass(frozen=True)
class Case:
    """A request: local ids, the soft prompt's name (None: the plain model)."""

    ids: tuple[int, ...]
    key: str | None = None


class Reference:
    """Answers of the library, one at a time."""

    def __init__(self, backbone: Backbone, prompts: dict[str, SoftPrompt]) -> None:
        self.backbone, self.prompts = backbone, prompts

    def prompt(self, key: str | None) -> SoftPrompt:
        return self.prompts[key] if key else SoftPrompt(torch.zeros(0, self.backbone.hidden_size))

    def text(self, case: Case, tokens: int) -> list[int]:
        (found,) = generate(self.backbone, self.prompt(case.key), [case.ids], Sampling(max_new_tokens=tokens))
        return found

    def scores(self, case: Case, branches: Sequence[Sequence[int]]) -> list[float]:
        # Rows alone, no packing: independent of what engines share.
        found = score_branches(self.backbone, self.prompt(case.key), [case.ids], [branches], "rows")
        return [float(x) for x in found.full[0]]


def prompts_of(backbone: Backbone, sizes: Sequence[int], seed: int = 0, scale: float = 0.3) -> dict[str, SoftPrompt]:
    """Soft prompts ``s0``, ``s1``, ... of these numbers of rows, and one prefix ``kv`` if the backbone holds it."""
    g = torch.Generator().manual_seed(seed)
    return {f"s{i}": SoftPrompt(torch.randn(p, backbone.hidden_size, generator=g) * scale) for i, p in enumerate(sizes)}


def prefix_of(backbone: Backbone, tokens: int, seed: int = 0) -> SoftPrompt:
    g = torch.Generator().manual_seed(seed)
    return SoftPrompt(torch.randn(tokens, backbone.geometry.width, generator=g) * 0.3, "prefix")


def cases_of(reference: Reference, count: int, seed: int = 1, longest: int = 14) -> list[Case]:
    """Contexts of many lengths over all soft prompts and the plain model, virtual ids in front."""
    rng, vocabulary = random.Random(seed), reference.backbone.vocab_size
    keys: list[str | None] = [None, *reference.prompts]
    found = []
    for i in range(count):
        key = keys[i % len(keys)]
        text = tuple(rng.randrange(1, vocabulary - 8) for _ in range(rng.randrange(1, longest)))
        found.append(Case((*virtual(reference, key), *text), key))
    return found


def virtual(reference: Reference, key: str | None) -> range:
    base = reference.backbone.vocab_size
    return range(base, base + reference.prompt(key).virtual_ids)


async def load(engine: Engine, prompts: dict[str, SoftPrompt]) -> None:
    for key, prompt in prompts.items():
        await engine.put(Rows(key, prompt.values.numpy().astype(np.float32), prompt.kind))


def request(case: Case, salt: str = "", **decoding: object) -> Request:
    return Request(f"r{next(_ids)}", case.ids, case.key, Decoding(**decoding), salt)  # type: ignore[arg-type]


async def collect(tokens: AsyncIterator[Token]) -> list[Token]:
    async with asyncio.timeout(TIME_LIMIT):
        return [t async for t in tokens]


def ids_of(tokens: Sequence[Token]) -> list[int]:
    return [t.id for t in tokens if t.id >= 0]


async def check_mixed_batch(engine: Engine, reference: Reference, count: int = 24, tokens: int = 7) -> None:
    """Any mix in one batch gives what each request gives alone."""
    cases = cases_of(reference, count)
    answers = await asyncio.gather(*(collect(engine.generate(request(c, max_tokens=tokens))) for c in cases))
    for case, answer in zip(cases, answers, strict=True):
        expected = reference.text(case, tokens)
        assert ids_of(answer) == expected, case
        assert answer[-1].finish == ("length" if len(expected) == tokens else "stop")
        assert all(t.finish is None for t in answer[:-1])


async def check_same_text_other_prompt(engine: Engine, reference: Reference) -> None:
    """The same text behind different soft prompts, again and again: what is shared never leaks."""
    text = tuple(range(20, 20 + 40))
    cases = [Case((*virtual(reference, k), *text), k) for k in (None, *reference.prompts)]
    expected = [reference.text(c, 5) for c in cases]
    for salt in ("", "", "tenant-a", "tenant-b", "tenant-a"):
        answers = await asyncio.gather(*(collect(engine.generate(request(c, salt, max_tokens=5))) for c in cases))
        assert [ids_of(a) for a in answers] == expected


async def check_salts_share_nothing(engine: Engine, reference: Reference) -> None:
    """A tenant's second request finds its keys and values; another tenant's first does not."""
    case = Case(tuple(range(30, 30 + 80)))
    first = await collect(engine.generate(request(case, "one", max_tokens=2)))
    again = await collect(engine.generate(request(case, "one", max_tokens=2)))
    other = await collect(engine.generate(request(case, "two", max_tokens=2)))
    assert (first[0].cached, other[0].cached) == (0, 0)
    assert again[0].cached > 0


async def check_scores(engine: Engine, reference: Reference, tolerance: float = 1e-4) -> None:
    """Branches of several tokens, mixed soft prompts, all at once."""
    branches = ((5, 7, 0), (5, 8), (9,), (5,))
    cases = cases_of(reference, 16, seed=2)
    asked = [ScoreRequest(f"r{next(_ids)}", c.ids, branches, c.key) for c in cases]
    for _ in range(3):  # a soft prompt that comes again is read from what was kept
        answers = await asyncio.gather(*(engine.score(a) for a in asked))
        for case, answer in zip(cases, answers, strict=True):
            assert answer == pytest.approx(reference.scores(case, branches), abs=tolerance)


async def check_logprobs(engine: Engine, reference: Reference, tolerance: float = 1e-4) -> None:
    """Log-probabilities are the model's own, and the likeliest come in order."""
    case = cases_of(reference, 4)[1]
    answer = await collect(engine.generate(request(case, max_tokens=4, top_logprobs=3, ignore_eos=True)))
    text = ids_of(answer)
    for i, token in enumerate(answer):
        behind = Case((*case.ids, *text[:i]), case.key)
        assert token.logprob == pytest.approx(reference.scores(behind, [[token.id]])[0], abs=tolerance)
        assert len(token.top) == 3
        assert token.top[0] == (token.id, pytest.approx(token.logprob, abs=tolerance))
        assert [p for _, p in token.top] == sorted((p for _, p in token.top), reverse=True)


async def check_abort(engine: Engine, reference: Reference) -> None:
    """Closing the stream, and abort by id, free the request while others go on."""
    cases = cases_of(reference, 3, seed=5)
    kept = asyncio.create_task(collect(engine.generate(request(cases[0], max_tokens=12, ignore_eos=True))))
    left = engine.generate(request(cases[1], max_tokens=200, ignore_eos=True))
    await anext(left)
    await left.aclose()  # type: ignore[attr-defined]
    ended = request(cases[2], max_tokens=200, ignore_eos=True)
    stream = engine.generate(ended)
    await anext(stream)
    await engine.abort(ended.id)
    rest = await collect(stream)
    assert rest[-1].finish == "abort"
    assert len(rest) < 200
    assert len(await kept) == 12
    await engine.abort("nobody")
    async with asyncio.timeout(TIME_LIMIT):
        while (s := await engine.stats()).running + s.waiting:
            await asyncio.sleep(0.01)


async def check_reload(engine: Engine, reference: Reference) -> None:
    """Another content under another key while requests run: each answer is of one content, whole."""
    old, new = (SoftPrompt(p.values.flip(0)) for p in list(reference.prompts.values())[:2])
    size = min(old.tokens, new.tokens)
    contents = {"old": SoftPrompt(old.values[:size]), "new": SoftPrompt(new.values[:size])}
    known = Reference(reference.backbone, contents)
    text = tuple(range(40, 60))
    base = reference.backbone.vocab_size
    case = {k: Case((*range(base, base + size), *text), k) for k in contents}
    expected = {k: known.text(c, 6) for k, c in case.items()}
    assert expected["old"] != expected["new"]
    await load(engine, {"old": contents["old"]})
    begun = [engine.generate(request(case["old"], max_tokens=6)) for _ in range(4)]
    firsts = [await anext(b) for b in begun]
    await engine.drop("old")  # those that run keep it
    await load(engine, {"new": contents["new"]})
    after = await asyncio.gather(*(collect(engine.generate(request(case["new"], max_tokens=6))) for _ in range(4)))
    assert [ids_of(a) for a in after] == [expected["new"]] * 4
    for first, rest in zip(firsts, await asyncio.gather(*map(collect, begun)), strict=True):
        assert ids_of([first, *rest]) == expected["old"]
    await engine.drop("new")
    with pytest.raises(EngineError):
        await collect(engine.generate(request(case["new"], max_tokens=1)))


async def check_seeds(engine: Engine, reference: Reference) -> None:
    """A seed gives the same text alone and in a crowd; without one, texts differ."""
    case, *others = cases_of(reference, 9, seed=7)
    sampled = {"max_tokens": 8, "temperature": 1.0, "ignore_eos": True}
    alone = ids_of(await collect(engine.generate(request(case, seed=11, **sampled))))
    crowd = [request(c, seed=i, **sampled) for i, c in enumerate(others)]
    together = await asyncio.gather(*(collect(engine.generate(r)) for r in [request(case, seed=11, **sampled), *crowd]))
    assert ids_of(together[0]) == alone
    free = [ids_of(await collect(engine.generate(request(case, **sampled)))) for _ in range(4)]
    assert len({tuple(f) for f in free}) > 1


async def check_refusals(engine: Engine, reference: Reference) -> None:
    """What cannot be run is refused by name and takes nothing down."""
    base = reference.backbone.vocab_size
    window = min(reference.backbone.window, 1 << 16)
    bad = [
        Request(f"r{next(_ids)}", (), None),
        Request(f"r{next(_ids)}", (1, 2), "nobody"),
        Request(f"r{next(_ids)}", (base, 1), None),
        Request(f"r{next(_ids)}", (base + 4096, 1), "s0"),
        Request(f"r{next(_ids)}", (-1, 1), None),
        Request(f"r{next(_ids)}", (1,) * (window + 1), None),
        Request(f"r{next(_ids)}", (1, 2), None, Decoding(max_tokens=0)),
    ]
    for r in bad:
        with pytest.raises(EngineError):
            await collect(engine.generate(r))
    for values in (np.full((2, reference.backbone.hidden_size), np.nan, "f4"), np.zeros((2, 5), "f4")):
        with pytest.raises(EngineError):
            await engine.put(Rows("bad", values))
    await check_mixed_batch(engine, reference, count=3, tokens=3)
