"""Populations against members trained alone, and every engine against plain steps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from foreword.backbone import memory
from foreword.backbone.choose import Layout
from foreword.backbone.layers import compiled_layers, decoder_layers
from foreword.backbone.load import Backbone
from foreword.backbone.memory import MB, Peak, free_memory
from foreword.config import Member, Recipe, TrainConfig, members
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt
from foreword.recipe import merge
from foreword.records import Example
from foreword.training import prepare
from foreword.training.checkpoint import read_checkpoint, write_checkpoint
from foreword.training.engine import Eager, choose_engine
from foreword.training.loop import Hooks, train
from foreword.training.passes import Reader
from foreword.training.prepare import prepared
from foreword.training.state import Population, make_plan, start
from foreword.training.static import Static, choose_widths, flatten, view

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EXAMPLES = [Example(i, (5, 6, *range(20 + i, 22 + 2 * i)), ((10, 11, 0), (12, 0))[i % 2], i % 2) for i in range(10)]
MEMBERS = (Member("text", 0, 0.01), Member("text", 1, 0.03), Member("random", 2, 0.003))
OPENING = (*range(tiny.VOCAB, tiny.VOCAB + 4), 5, 6)
ROWS = tiny.in_front(EXAMPLES, 4)
CONFIG = TrainConfig(epochs=3, batch_size=4, warmup_steps=2, clip=1.0, schedule="cosine")


def begin(config: TrainConfig, chosen: tuple[Member, ...] = MEMBERS, device: torch.device = CPU) -> Population:
    first = [torch.randn(4, tiny.HIDDEN, generator=torch.Generator().manual_seed(m.seed)) * 0.2 for m in chosen]
    return start([tiny.soft(rows) for rows in first], chosen, config, make_plan(len(EXAMPLES), config), device)


def run(
    backbone: Backbone, population: Population, config: TrainConfig, layout: Layout = "packed", **hooks: Any
) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    with prepared(backbone, ROWS, population, config, layout) as ready:
        train(
            ready.engine, ready.segments, population, config, Hooks(on_event=lambda e: events.append(dict(e)), **hooks)
        )
    return events


def losses(events: list[dict[str, Any]]) -> list[list[float]]:
    return [e.get("losses", [e["loss"]]) for e in events if e["event"] == "step"]


@pytest.mark.parametrize(
    ("family", "layout"), [("llama-gqa", "packed"), ("gemma3", "packed"), ("bloom", "rows"), ("mamba", "rows")]
)
@pytest.mark.parametrize("budget", [0, 60])
def test_members_train_as_they_would_alone(family: str, layout: Layout, budget: int) -> None:
    backbone = tiny.backbone(family, torch.float64)
    config = dataclasses.replace(CONFIG, token_budget=budget)
    together = begin(config)
    events = run(backbone, together, config, layout)
    assert [e["members"] for e in events] == [[0, 1, 2]] * 9
    for k, member in enumerate(MEMBERS):
        alone = begin(config, (member,))
        mine = run(backbone, alone, config, layout)
        assert [row[k] for row in losses(events)] == pytest.approx([row[0] for row in losses(mine)], abs=1e-5)
        torch.testing.assert_close(together.states[k].kept(), alone.states[0].kept(), atol=1e-5, rtol=1e-5)
        assert together.states[k].recent == pytest.approx(alone.states[0].recent, abs=1e-5)


def test_members_stop_for_themselves_and_leave_the_pass() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float64)
    config = dataclasses.replace(CONFIG, epochs=6, select="loss", patience=1)

    def validator(scores: dict[int, list[float]], population: Population) -> Callable[[SoftPrompt], dict[str, float]]:
        def validate(prompt: SoftPrompt) -> dict[str, float]:
            seed = next(s.member.seed for s in population.states if torch.equal(s.method(), prompt.values))
            return {"loss": scores[seed].pop(0)}

        return validate

    def scores() -> dict[int, list[float]]:
        return {0: [5, 4, 3, 2, 1, 0.5], 1: [1.0, 2.0], 2: [4, 3, 9]}  # one learns on, two get worse

    together = begin(config)
    events = run(backbone, together, config, validate=validator(scores(), together))
    trained = [e["members"] for e in events if e["event"] == "step"]
    assert [len(m) for m in trained] == [3] * 6 + [2] * 3 + [1] * 9
    assert trained[-1] == [0]
    assert [s.step for s in together.states] == [18, 6, 9]
    assert together.best == 0
    for k, member in enumerate(MEMBERS):
        alone = begin(config, (member,))
        run(backbone, alone, config, validate=validator(scores(), alone))
        torch.testing.assert_close(together.states[k].kept(), alone.states[0].kept(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stop_after", [1, 5])
def test_a_population_resumed_is_uninterrupted_bit_for_bit(tmp_path: Any, stop_after: int) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    whole = begin(CONFIG)
    run(backbone, whole, CONFIG)
    cut = begin(CONFIG)
    with pytest.raises(KeyboardInterrupt):
        run(
            backbone, cut, CONFIG,
            save=lambda p: write_checkpoint(tmp_path, p.checkpoint()), interrupted=lambda: cut.step >= stop_after,
        )  # fmt: skip
    resumed, found = begin(CONFIG), read_checkpoint(tmp_path)
    assert found is not None
    resumed.restore(found)
    run(backbone, resumed, CONFIG)
    assert resumed.step == whole.step == 9
    for a, b in zip(resumed.states, whole.states, strict=True):
        assert torch.equal(a.kept(), b.kept())
        assert a.recent == b.recent


def test_the_best_member_has_the_best_validation_or_the_lowest_training_loss() -> None:
    population = begin(CONFIG)
    for state, recent in zip(population.states, (0.5, 0.2, float("nan")), strict=True):
        state.recent = recent
    assert population.best == 1
    for state, score in zip(population.states, (0.7, 0.6, 0.7), strict=True):
        state.best, state.best_score = state.method.state_dict(), score
    assert population.best == 0


def test_lists_in_the_recipe_make_a_population() -> None:
    lists = {"prompt": {"init": ["text", "random"]}, "train": {"lr": [0.1, "1e-2"], "seed": [3, 5]}}
    found = members(merge(Recipe(), lists, "test"))
    assert set(found) == {Member(i, s, lr) for i, lr, s in itertools.product(("text", "random"), (0.1, 0.01), (3, 5))}
    counted = members(merge(Recipe(), {"prompt": {"population": 3}, "train": {"seed": 7}}, "test"))
    assert counted == tuple(Member("text", seed, 0.0) for seed in (7, 8, 9))
    assert members(Recipe()) == (Member("text", 0, 0.0),)


@pytest.mark.parametrize("value", [[], [0.1, 0.1], [0.1, "x"], [[0.1]]])
def test_lists_that_make_no_population_are_refused(value: list[Any]) -> None:
    with pytest.raises(ForewordError, match=r"train\.lr"):
        merge(Recipe(), {"train": {"lr": value}}, "test")


@pytest.mark.parametrize(("family", "layout"), [("llama-gqa", "packed"), ("gemma3", "packed"), ("bloom", "rows")])
@pytest.mark.parametrize("budget", [0, 60])
def test_static_shapes_train_as_plain_steps(family: str, layout: Layout, budget: int) -> None:
    backbone = tiny.backbone(family, torch.float64)
    found = []
    for kind in (Eager, lambda *args: Static(*args, captured=False)):
        population = begin(CONFIG)
        reader = Reader(OPENING, backbone.vocab_size, 4, CONFIG.batch_size, budget or 1000, layout)
        engine = kind(backbone, reader, CONFIG)
        events: list[dict[str, Any]] = []
        segments = [dataclasses.replace(e.segment, context=e.context[2:]) for e in EXAMPLES]
        train(engine, segments, population, CONFIG, Hooks(on_event=lambda e: events.append(dict(e))))  # noqa: B023
        found.append((population, events))
    (plain, plain_events), (static, static_events) = found
    for a, b in zip(losses(plain_events), losses(static_events), strict=True):
        assert b == pytest.approx(a, abs=1e-6)
    for p, s in zip(plain.states, static.states, strict=True):
        torch.testing.assert_close(s.kept(), p.kept(), atol=1e-5, rtol=1e-5)
    assert len(engine.work) <= 8, "a few shapes, not one a step"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.integers(1, 4), st.sampled_from([1, 8, 16]))
def test_widths_hold_everything_and_pad_least(widths: list[int], buckets: int, multiple: int) -> None:
    chosen = choose_widths(widths, buckets, multiple)
    assert len(chosen) <= buckets
    assert all(c % multiple == 0 for c in chosen)

    def cost(some: tuple[int, ...] | list[int]) -> float:
        return sum(min((c for c in some if c >= w), default=float("inf")) for w in widths)

    rounded = sorted({-(-w // multiple) * multiple for w in widths})
    tried = itertools.chain.from_iterable(
        itertools.combinations(rounded, n) for n in range(1, min(buckets, len(rounded)) + 1)
    )
    assert cost(chosen) == min(map(cost, tried))


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_a_pass_comes_back_from_its_numbers(layout: Layout) -> None:
    reader = Reader(OPENING, tiny.VOCAB, 4, 4, 1000, layout)
    segments = [e.segment for e in EXAMPLES]
    (part,) = reader.read([segments[:3], segments[3:7]])
    shape = part.shape
    wider = shape._replace(width=shape.width + 5, targets=shape.targets + 3)
    back = view(flatten(part, wider), wider, layout == "packed")
    assert torch.equal(back.row.ids[:, : shape.width], part.row.ids)
    at = back.row.keep[: shape.targets]
    assert torch.equal(back.row.ids.flatten()[at], part.row.ids.flatten()[part.row.keep])
    assert back.count[shape.targets :].eq(0).all()
    values = torch.randn(wider.targets)
    torch.testing.assert_close(back.losses(values, 2), part.losses(values[: shape.targets], 2))


def test_recomputed_activations_change_nothing_and_leave_no_trace() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float64)
    plain, recomputed = begin(CONFIG), begin(CONFIG)
    run(backbone, plain, CONFIG)
    run(backbone, recomputed, dataclasses.replace(CONFIG, recompute=True))
    for a, b in zip(plain.states, recomputed.states, strict=True):
        torch.testing.assert_close(a.kept(), b.kept(), atol=1e-12, rtol=0)
    assert not any("forward" in vars(layer) for layer in decoder_layers(backbone.model))


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of its own parts
def test_compiled_layers_train_as_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as ever, but not made into C++, which takes 40 s here.
    monkeypatch.setattr(prepare, "compiled_layers", functools.partial(compiled_layers, backend="aot_eager"))
    backbone = tiny.backbone("llama-gqa", torch.float32)
    whole = dataclasses.replace(CONFIG, batch_size=10)  # one shape: each costs a compilation
    plain, compiled = begin(whole), begin(whole)
    expected = losses(run(backbone, plain, whole))
    config = dataclasses.replace(whole, engine="compile")
    with prepared(backbone, ROWS, compiled, config, "packed") as ready:
        assert ready.name == "compile", ready.notes
        events: list[dict[str, Any]] = []
        hooks = Hooks(on_event=lambda e: events.append(dict(e)))
        train(ready.engine, ready.segments, compiled, config, hooks)
    for a, b in zip(expected, losses(events), strict=True):
        assert b == pytest.approx(a, abs=1e-3)
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(backbone.model))


def test_compiled_layers_run_plainly_without_gradients() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = backbone.model(input_ids=ids).logits
        with compiled_layers(backbone.model, backend="eager"):
            torch._dynamo.utils.counters.clear()
            assert torch.equal(backbone.model(input_ids=ids).logits, expected)
            assert not torch._dynamo.utils.counters["frames"]["total"]


def test_an_engine_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    original = prepare._make

    def broken(name: str, *args: Any) -> Any:
        engine = original("eager", *args)
        if name != "eager":
            step = engine.step
            engine.step = lambda: dataclasses.replace(step(), loss=torch.full((3,), 7.0))
        return engine

    monkeypatch.setattr(prepare, "_make", broken)
    monkeypatch.setattr(prepare, "choose_engine", lambda *args: "graph")
    with prepared(backbone, ROWS, begin(CONFIG), CONFIG, "packed") as ready:
        assert ready.name == "eager"
        assert "differ from plain steps" in " ".join(ready.notes)
    asked = dataclasses.replace(CONFIG, engine="graph")
    with (
        pytest.raises(ForewordError, match="does not work here"),
        prepared(backbone, ROWS, begin(asked), asked, "packed"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "device", "steps", "expected"),
    [
        ("auto", CPU, 10**6, "eager"),
        ("compile", CPU, 1, "compile"),
        ("eager", CUDA, 10**6, "eager"),
        ("auto", CUDA, 10, "eager"),
        ("auto", CUDA, 1000, "graph"),
        ("auto", CUDA, 10**6, "compile"),
    ],
)
def test_the_engine_follows_from_device_and_steps(name: str, device: torch.device, steps: int, expected: str) -> None:
    assert choose_engine(name, device, steps, tokens=300, layers=30, parameters=135_000_000) == expected


def test_graphs_are_refused_without_cuda() -> None:
    with pytest.raises(ForewordError, match="needs a CUDA device"):
        choose_engine("graph", CPU, 100, 300, 30, 10**8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_replayed_graphs_train_as_plain_steps(optimizer: str) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    backbone.model.to(CUDA)
    config = dataclasses.replace(CONFIG, epochs=8, optimizer=optimizer)
    found = []
    for kind in (Eager, lambda *args: Static(*args, captured=True)):
        population = begin(config, device=CUDA)
        engine = kind(backbone, Reader(OPENING, backbone.vocab_size, 4, 4, 1000, "packed"), config)
        segments = [dataclasses.replace(e.segment, context=e.context[2:]) for e in EXAMPLES]
        train(engine, segments, population, config, Hooks())
        found.append(population)
    for p, s in zip(found[0].states, found[1].states, strict=True):
        torch.testing.assert_close(s.kept(), p.kept(), atol=1e-3, rtol=1e-3)


def test_a_population_is_split_to_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)

    class Measured:
        def __init__(self, device: torch.device) -> None:
            self.size = 10 * MB

    monkeypatch.setattr(prepare, "Peak", Measured)
    monkeypatch.setattr(prepare, "free_memory", lambda device: 26 * MB)
    population = begin(CONFIG)
    with prepared(backbone, ROWS, population, CONFIG, "packed") as ready:
        note = ready.notes[0]
        assert "population of 3 soft prompts, 2 in a pass (2 passes a step; as many as fit into memory)" in note
        train(ready.engine, ready.segments, population, CONFIG, Hooks())
    whole = begin(CONFIG)
    monkeypatch.setattr(prepare, "free_memory", lambda device: 10**4 * MB)
    with prepared(backbone, ROWS, whole, CONFIG, "packed") as ready:
        assert ready.notes[0].startswith("population of 3 soft prompts, 3 in a pass: about 30 MB")
        train(ready.engine, ready.segments, whole, CONFIG, Hooks())
    for a, b in zip(population.states, whole.states, strict=True):
        torch.testing.assert_close(a.kept(), b.kept(), atol=1e-3, rtol=1e-3)


def test_peak_memory_sees_what_was_there_for_a_moment() -> None:
    if not memory._CLEAR.exists():
        pytest.skip("only Linux can reset the peak")
    peak = Peak(CPU)
    torch.ones(50 * MB)  # 200 MB, gone at once
    assert peak.size is not None
    assert 190 * MB <= peak.size <= 260 * MB
    assert free_memory(CPU) > 0
