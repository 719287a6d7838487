"""Soft prompts by name: loaded once, kept while in use, switched at once, never mixed up, never in the way."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import tracemalloc
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from foreword.artifact.ensemble import write_ensemble
from foreword.artifact.folder import CONFIG, WEIGHTS
from foreword.backbone.generate import Sampling
from foreword.errors import ForewordError
from foreword.evaluation.scoring import needs_end
from foreword.jobs.load import load as library_load
from foreword.serving.engine import Decoding, Engine, EngineDown, Request, ScoreRequest
from foreword.serving.registry import Card, Loaded, Registry, UnknownName
from foreword.serving.store import Store
from foreword.serving.text import Base
from serving_parts import NBYTES, TASK, TOKENS, Books, capabilities, run, soft_prompt, values_of


def registry_over(engine: Engine, *sources: Path, room: int = 100) -> Registry:
    """A registry with room for so many of the usual soft prompts."""
    base = Base("tiny-model", tiny.tokenizer(), capabilities())
    return Registry(engine, base, Store(sources), room * NBYTES)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for i, name in enumerate("abcd"):
        soft_prompt(tmp_path / "store" / name, i)
    return tmp_path / "store"


def rows_of(engine: Books, loaded: Loaded) -> list[torch.Tensor]:
    return [torch.from_numpy(engine.held[m.key].values) for m in loaded.members]


async def use(registry: Registry, *names: str) -> list[Loaded]:
    found = []
    for name in names:
        async with registry.lease(name) as loaded:
            found.append(loaded)
    await registry.close()
    return found


def names_in(engine: Books) -> list[str]:
    return sorted(key.partition("@")[0] for key in engine.held)


async def unknown(registry: Registry, name: str) -> None:
    with pytest.raises(UnknownName):
        async with registry.lease(name):
            pytest.fail("a lease of nothing")


# --- loading -------------------------------------------------------------------------------------


def test_a_lease_loads_what_was_written_and_says_what_it_is(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        async with registry.lease("b") as loaded:
            (member,) = loaded.members
            assert (loaded.name, loaded.task, loaded.nbytes) == ("b", TASK, NBYTES)
            assert (member.tokens, member.kind, member.nbytes) == (TOKENS, "rows", NBYTES)
            assert member.reader.classes == TASK.classes
            assert loaded.created == int((store / "b" / CONFIG).stat().st_mtime)
            assert torch.equal(rows_of(engine, loaded)[0], values_of(1))
        assert engine.events == [("put", member.key)], "it stays when the lease ends"
        assert registry.usage() == (NBYTES, 1, 0, 1, 0)
        await use(registry, "b", "b")
        assert registry.usage() == (NBYTES, 1, 2, 1, 0)

    run(check())


def test_an_ensemble_is_one_name_with_several_members(store: Path) -> None:
    async def check() -> None:
        write_ensemble(store / "both", [store / "a", store / "b"])
        engine = Books()
        (loaded,) = await use(registry_over(engine, store), "both")
        assert [torch.equal(r, values_of(i)) for i, r in enumerate(rows_of(engine, loaded))] == [True, True]
        assert len({m.key for m in loaded.members}) == 2
        assert loaded.nbytes == 2 * NBYTES

    run(check())


def test_requests_at_once_for_one_name_share_one_load(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        engine.gate.clear()
        waiting = [asyncio.create_task(use(registry, "a")) for _ in range(50)]
        await asyncio.sleep(0.05)
        engine.gate.set()
        found = await asyncio.gather(*waiting)
        assert len({id(loaded) for [loaded] in found}) == 1
        assert len(engine.events) == 1
        assert registry.usage().misses == 1

    run(check())


def test_a_client_that_leaves_does_not_stop_the_load_for_others(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        engine.gate.clear()
        first, second = (asyncio.create_task(use(registry, "a")) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        engine.gate.set()
        assert len(await second) == 1
        assert len(engine.events) == 1

    run(check())


def test_a_load_that_everybody_left_is_there_for_the_next(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        engine.gate.clear()
        task = asyncio.create_task(use(registry, "a"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.gate.set()
        await registry.close()
        await use(registry, "a")
        assert registry.usage() == (NBYTES, 1, 1, 1, 0)

    run(check())


def test_unknown_names_are_unknown_until_they_appear(store: Path) -> None:
    async def check() -> None:
        registry = registry_over(Books(), store)
        for name in ("new", "", "../a", "a" * 1000, "tiny-model", "\ud800", "a@000000000000", "a@"):
            await unknown(registry, name)
        await asyncio.gather(*(unknown(registry, f"none-{i}") for i in range(20)))
        soft_prompt(store / "new", 9)
        assert (await use(registry, "new"))[0].name == "new"
        assert [c.name for c in registry.cards()] == ["a", "b", "c", "d", "new"]

    run(check())


def test_a_damaged_soft_prompt_is_refused_without_naming_the_servers_folders(store: Path, tmp_path: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        (store / "a" / WEIGHTS).write_bytes(b"")
        for _ in range(2):
            with pytest.raises(ForewordError, match="truncated") as caught:
                await use(registry, "a")
            assert str(tmp_path) not in str(caught.value)
            assert "'a'" in caught.value.where
        assert engine.events == []
        soft_prompt(store / "a", 0)
        await use(registry, "a")
        assert registry.usage() == (NBYTES, 1, 0, 1, 0)

    run(check())


def test_the_bases_name_is_no_soft_prompts(store: Path) -> None:
    async def check() -> None:
        with pytest.raises(ForewordError, match="called like the plain model"):
            await registry_over(Books(), store).load("tiny-model", "a")
        soft_prompt(store / "tiny-model", 1)
        with pytest.raises(ForewordError, match="called like the plain model"):
            registry_over(Books(), store)

    run(check())


def test_a_revision_and_the_bases_name_may_stand_with_a_name(store: Path) -> None:
    async def check() -> None:
        registry = registry_over(Books(), store)
        (plain,) = await use(registry, "a")
        exact = f"a@{plain.revision}"
        assert await use(registry, exact, "tiny-model:a", f"tiny-model:{exact}") == [plain] * 3
        assert (await registry.card(exact)).loaded
        soft_prompt(store / "a", 9)
        await registry.load("a", inplace=True)
        await unknown(registry, exact)
        with pytest.raises(UnknownName):
            await registry.card(exact)
        assert (await use(registry, "a"))[0].revision != plain.revision

    run(check())


# --- room ----------------------------------------------------------------------------------------


def test_what_was_not_used_for_longest_goes_first(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store, room=3)
        await use(registry, "a", "b", "c", "a", "d")
        assert names_in(engine) == ["a", "c", "d"]
        assert registry.usage() == (3 * NBYTES, 3, 1, 4, 1)
        order = [(what, key[0]) for what, key in engine.events]
        assert order[-2:] == [("drop", "b"), ("put", "d")], "room is made before it is needed"
        await use(registry, "b")
        assert names_in(engine) == ["a", "b", "d"]

    run(check())


def test_what_is_in_use_is_never_dropped_and_the_excess_goes_when_it_is_not(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store, room=2)
        async with AsyncExitStack() as stack:
            for name in "abcd":
                await stack.enter_async_context(registry.lease(name))
            assert names_in(engine) == ["a", "b", "c", "d"]
            assert registry.usage().bytes == 4 * NBYTES
        await registry.close()
        assert registry.usage().bytes == 2 * NBYTES
        assert len(engine.held) == 2

    run(check())


def test_an_engine_with_less_room_than_the_budget_gets_the_longest_unused_dropped(store: Path) -> None:
    async def check() -> None:
        engine = Books(room=2 * NBYTES)
        registry = registry_over(engine, store)
        await use(registry, "a", "b", "c")
        assert names_in(engine) == ["b", "c"]
        async with registry.lease("b"), registry.lease("c"):
            with pytest.raises(EngineDown, match="no room beside the soft prompts in use"):
                await use(registry, "d")
        assert [len(await use(registry, "d")), names_in(engine)] == [1, ["c", "d"]]
        engine.room = 0
        with pytest.raises(EngineDown, match="it is full"):
            await use(registry, "a")
        await registry.close()
        assert registry.usage().bytes == sum(r.values.nbytes for r in engine.held.values())

    run(check())


def test_a_soft_prompt_beyond_the_budget_is_refused_and_nothing_makes_way_for_it(store: Path) -> None:
    async def check() -> None:
        soft_prompt(store / "large", 9, tokens=3 * TOKENS)
        engine = Books()
        registry = registry_over(engine, store, room=2)
        await use(registry, "a", "b")
        with pytest.raises(ForewordError, match=f"has {3 * NBYTES} bytes, all together may have {2 * NBYTES}"):
            await use(registry, "large")
        assert names_in(engine) == ["a", "b"]

    run(check())


# --- an engine that comes and goes ---------------------------------------------------------------


def test_soft_prompts_are_put_again_into_an_engine_that_started_anew(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        before = await use(registry, "a", "b")
        engine.restart()
        assert await use(registry, "a") == before[:1], "the same keys"
        assert torch.equal(rows_of(engine, before[0])[0], values_of(0))
        assert names_in(engine) == ["a"], "the other when it is asked for"
        assert registry.usage().bytes == 2 * NBYTES
        soft_prompt(store / "b", 9)  # its old content is nowhere any more
        (after,) = await use(registry, "b")
        assert after.revision != before[1].revision
        assert torch.equal(rows_of(engine, after)[0], values_of(9))

    run(check())


def test_an_engine_that_starts_anew_in_the_middle_of_a_load_gets_the_rows_again(store: Path) -> None:
    async def check() -> None:
        write_ensemble(store / "both", [store / "a", store / "b"])
        engine = Books()
        registry = registry_over(engine, store)
        engine.gate.clear()
        task = asyncio.create_task(use(registry, "both"))
        await asyncio.sleep(0.05)
        engine.restart()
        engine.gate.set()
        (loaded,) = await task
        assert [torch.equal(r, values_of(i)) for i, r in enumerate(rows_of(engine, loaded))] == [True, True]

    run(check())


def test_a_content_that_changed_while_the_engine_started_anew_leaves_nothing_of_the_old_one(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        engine.gate.clear()
        task = asyncio.create_task(use(registry, "a"))
        await asyncio.sleep(0.05)  # its rows wait to be put
        engine.restart()
        soft_prompt(store / "a", 9)
        engine.gate.set()
        (loaded,) = await task
        assert list(engine.held) == [loaded.members[0].key]
        assert torch.equal(rows_of(engine, loaded)[0], values_of(9))

    run(check())


def test_an_engine_that_is_down_is_an_error_until_it_is_back(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        await use(registry, "a")
        engine.down = True
        with pytest.raises(EngineDown):
            await use(registry, "b")
        engine.restart()
        with pytest.raises(EngineDown):
            await use(registry, "a")
        await registry.unload("c")
        engine.down = False
        await use(registry, "a", "b")
        assert (names_in(engine), registry.usage().bytes) == (["a", "b"], 2 * NBYTES)

    run(check())


# --- load and unload -----------------------------------------------------------------------------


def test_in_place_running_requests_keep_the_old_content_and_later_ones_get_the_new(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        async with registry.lease("a") as old:
            soft_prompt(store / "a", 9)
            async with registry.lease("a") as still:
                assert still is old, "a change on disk alone changes nothing"
            new = await registry.load("a", inplace=True)
            assert (await use(registry, "a")) == [new]
            assert torch.equal(rows_of(engine, old)[0], values_of(0))
            assert torch.equal(rows_of(engine, new)[0], values_of(9))
            assert registry.usage().bytes == 2 * NBYTES
        await registry.close()
        assert list(engine.held) == [new.members[0].key]
        assert registry.usage() == (NBYTES, 1, 2, 2, 0)

    run(check())


def test_content_that_comes_back_while_it_is_still_in_use_stays_when_that_use_ends(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        async with registry.lease("a") as first:
            for seed in (9, 0):
                soft_prompt(store / "a", seed)
                await registry.load("a", inplace=True)
        (again,) = await use(registry, "a")
        assert again.revision == first.revision
        assert torch.equal(rows_of(engine, again)[0], values_of(0))
        assert len(engine.held) == 1

    run(check())


def test_a_failed_reload_leaves_what_was_there(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store, room=1)
        (old,) = await use(registry, "a")
        (store / "a" / WEIGHTS).write_bytes(b"")
        with pytest.raises(ForewordError):
            await registry.load("a", inplace=True)
        soft_prompt(store / "a", 9)
        engine.down = True
        with pytest.raises(EngineDown):
            await registry.load("a", inplace=True)
        engine.down = False
        assert await use(registry, "a") == [old]
        assert list(engine.held) == [old.members[0].key]
        assert registry.usage().bytes == NBYTES

    run(check())


def test_a_name_is_loaded_from_a_path_of_the_store(store: Path) -> None:
    async def check() -> None:
        soft_prompt(store / "team" / "mine", 9)
        registry = registry_over(Books(), store)
        loaded = await registry.load("my own", "team/mine")
        assert await use(registry, "my own") == [loaded]
        assert await registry.load("my own", "team/mine") is loaded, "once more is no error"
        assert await registry.load("my own") is loaded
        assert [c.name for c in registry.cards() if c.loaded] == ["my own"]
        with pytest.raises(ForewordError, match="stands for another folder"):
            await registry.load("my own", "a")
        with pytest.raises(ForewordError, match="stands for another folder"):
            await registry.load("b", "a")
        switched = await registry.load("b", "a", inplace=True)
        assert switched.revision == (await use(registry, "a"))[0].revision
        for path in ("../store/a", str(store / "a"), "none", ""):
            with pytest.raises(ForewordError, match="no adapter or ensemble folder"):
                await registry.load("x", path)
        for name in ("", " ", "x" * 201, "a\n"):
            with pytest.raises(ForewordError, match="is no name"):
                await registry.load(name, "a")
        with pytest.raises(UnknownName):
            await registry.load("none")
        await registry.unload("my own")
        await unknown(registry, "my own")

    run(check())


def test_a_name_that_could_not_be_loaded_is_not_taken(store: Path) -> None:
    async def check() -> None:
        (store / "a" / WEIGHTS).write_bytes(b"")
        registry = registry_over(Books(), store)
        with pytest.raises(ForewordError, match="truncated"):
            await registry.load("mine", "a")
        await unknown(registry, "mine")
        await registry.load("mine", "b")
        await use(registry, "mine")

    run(check())


def test_a_path_outlasts_its_eviction(store: Path) -> None:
    async def check() -> None:
        registry = registry_over(Books(), store, room=1)
        loaded = await registry.load("mine", "a")
        await use(registry, "b")
        assert not (await registry.card("mine")).loaded
        assert (await use(registry, "mine"))[0].revision == loaded.revision

    run(check())


def test_what_is_unloaded_is_gone_at_once_and_its_rows_when_the_last_request_ends(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        async with registry.lease("a") as held:
            await registry.unload("a")
            await unknown(registry, "a")
            assert [c.name for c in registry.cards()] == ["b", "c", "d"]
            assert list(engine.held) == [held.members[0].key]
        await registry.close()
        assert (engine.held, registry.usage().bytes) == ({}, 0)
        for name in ("a", "none"):
            with pytest.raises(UnknownName):
                await registry.unload(name)
            with pytest.raises(UnknownName):
                await registry.card(name)
        await registry.load("a")
        assert len(await use(registry, "a")) == 1

    run(check())


def test_what_is_loaded_again_is_known_again_for_good(store: Path) -> None:
    async def check() -> None:
        registry = registry_over(Books(), store, room=1)
        await registry.unload("a")
        await registry.load("a")
        await use(registry, "b")
        assert await registry.card("a") == Card("a"), "it made place, and is still there to be asked for"
        assert len(await use(registry, "a")) == 1

    run(check())


def test_what_is_unloaded_while_it_loads_serves_who_waited_and_is_gone(store: Path) -> None:
    async def check() -> None:
        engine = Books()
        registry = registry_over(engine, store)
        engine.gate.clear()
        waiting = asyncio.create_task(use(registry, "a"))
        await asyncio.sleep(0.05)
        await registry.unload("tiny-model:a")
        await unknown(registry, "a")
        engine.gate.set()
        assert len(await waiting) == 1
        await registry.close()
        assert (engine.held, registry.usage().bytes) == ({}, 0)

    run(check())


def test_cards_say_what_is_known(store: Path) -> None:
    async def check() -> None:
        write_ensemble(store / "both", [store / "a", soft_prompt(store / "long", 7, tokens=6)])
        registry = registry_over(Books(), store)
        a, both = await use(registry, "a", "both")
        cards = {c.name: c for c in registry.cards()}
        assert sorted(cards) == ["a", "b", "both", "c", "d", "long"]
        assert cards["a"] == Card("a", True, a.revision, TOKENS, "rows", TASK.classes, NBYTES, 1, a.created)
        assert (cards["both"].tokens, cards["both"].members, cards["both"].nbytes) == (6, 2, both.nbytes)
        assert cards["b"] == Card("b")
        assert [await registry.card(n) for n in ("a", "b")] == [cards["a"], cards["b"]]

    run(check())


# --- all at once ---------------------------------------------------------------------------------


class Chaos:
    """Clients and an admin at random over a small budget, and an engine that restarts and refuses."""

    def __init__(self, store: Path, seed: int) -> None:
        self.random, self.store = random.Random(seed), store
        self.engine = Books(room=4 * NBYTES)
        self.registry = registry_over(self.engine, store, room=3)
        self.served = 0

    async def pause(self) -> None:
        await asyncio.sleep(self.random.choice([0, 0, 0, 0.001, 0.003]))

    async def client(self) -> None:
        for _ in range(25):
            with suppress(EngineDown, UnknownName):
                async with self.registry.lease(self.random.choice("abcd")) as loaded:
                    started = self.engine.epoch
                    await self.pause()
                    if self.engine.epoch == started and not self.engine.down:
                        self.right(loaded)
            await self.pause()

    def right(self, loaded: Loaded) -> None:
        """Every row is there, and of the revision that the lease names."""
        (rows,) = rows_of(self.engine, loaded)
        assert self.revisions.setdefault(loaded.revision, rows.sum().item()) == rows.sum().item()
        self.served += 1

    async def admin(self) -> None:
        for i in range(20):
            name = self.random.choice("abcd")
            with suppress(EngineDown, UnknownName):
                match self.random.randrange(4):
                    case 0:
                        soft_prompt(self.store / name, 100 + i)
                        await self.registry.load(name, inplace=True)
                    case 1:
                        await self.registry.load(name)
                    case 2:
                        await self.registry.unload(name)
                    case _:
                        self.engine.restart()
            await self.pause()

    async def run(self) -> None:
        self.revisions: dict[str, float] = {}
        clients = [asyncio.create_task(self.client()) for _ in range(8)]
        work = [*clients, asyncio.create_task(self.admin())]
        for _ in range(4):
            await self.pause()
            clients.pop(0).cancel()
        for result in await asyncio.gather(*work, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result
        await self.registry.close()
        assert self.served
        await self.books_are_right()

    async def books_are_right(self) -> None:
        """What the engine holds is what the registry says, no more."""
        for name in "abcd":
            await self.registry.load(name)  # every name is of the engine's last start again
            await self.registry.close()
        usage = self.registry.usage()
        assert usage.loaded == 3
        assert usage.bytes == 3 * NBYTES == sum(r.values.nbytes for r in self.engine.held.values())


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_at_once_every_request_has_its_rows_and_the_books_are_right(store: Path, seed: int) -> None:
    run(Chaos(store, seed).run())


def test_a_soft_prompt_costs_little_memory_beside_its_rows(tmp_path: Path) -> None:
    """16 rows of 576 floats are 37 kB; facts of 3.5 kB would be the ten per cent allowed."""
    count, first = 120, 20
    first_one = soft_prompt(tmp_path / "complaints of customer 0", 0)
    for i in range(1, count):
        shutil.copytree(first_one, tmp_path / f"complaints of customer {i}")

    class Forgetful(Books):
        async def put(self, rows: Any) -> None:
            return None

    async def load(registry: Registry, numbers: Sequence[int]) -> None:
        for i in numbers:
            async with registry.lease(f"complaints of customer {i}"):
                pass
        await registry.close()

    async def check() -> None:
        registry = registry_over(Forgetful(), tmp_path, room=count)
        await load(registry, range(first))
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            await load(registry, range(first, count))
            gc.collect()
            each = (tracemalloc.get_traced_memory()[0] - before) / (count - first)
        finally:
            tracemalloc.stop()
        assert registry.usage().loaded == count
        assert each < 1500, f"{each:.0f} bytes"

    run(check())


# --- with the real engine ------------------------------------------------------------------------


def softmax(values: Sequence[float]) -> np.ndarray[Any, Any]:
    shifted = np.exp(np.array(values) - max(values))
    return shifted / shifted.sum()


def test_with_the_real_engine_answers_are_the_librarys(store: Path, tmp_path: Path) -> None:
    from foreword.serving.engines.transformers import TransformersConfig, TransformersEngine

    model = tiny.save(tmp_path / "model")
    texts = ["my parcel is late", "thank you"]
    names = ["a", "b", "c", "prefix"]
    soft_prompt(store / "prefix", 5, kind="prefix")
    engine = TransformersEngine(TransformersConfig(str(model), kv_memory=4.0, prompt_memory=1.0))

    async def one(registry: Registry, base: Base, name: str, text: str) -> tuple[str, np.ndarray[Any, Any]]:
        async with registry.lease(name) as loaded:
            (member,) = loaded.members
            ids, stream = member.reader.row(text), base.decoder()
            said = ""
            async for token in engine.generate(Request(f"{name} {text}", ids, member.key, Decoding(max_tokens=6))):
                said += stream.step(token.id) if token.id >= 0 else ""
            words = member.reader.label_ids
            branches = words if needs_end(words) else tuple(w[:-1] for w in words)
            scores = await engine.score(ScoreRequest(f"score {name} {text}", ids, branches, member.key))
            return said + stream.finish(), softmax(scores)

    async def serve() -> list[tuple[str, np.ndarray[Any, Any]]]:
        base = Base("tiny-model", tiny.tokenizer(), await engine.start())
        registry = Registry(engine, base, Store([store]), 2 * NBYTES + 64 * TOKENS * 4)
        try:
            return await asyncio.gather(*(one(registry, base, n, t) for n in names for t in texts))
        finally:
            await registry.close()
            await engine.close()

    answers = iter(run(serve()))
    for name in names:
        own = library_load(store / name, model=str(model))
        sampling = Sampling(max_new_tokens=6)
        for text, expected in zip(own.generate(texts, sampling), own.predict(texts), strict=True):
            said, probabilities = next(answers)
            assert said.removeprefix(own.task.separator) == text
            assert probabilities == pytest.approx(list(expected.probabilities.values()), abs=1e-4)
