"""Prefixes of keys and values, compiled rows, weighted targets: against plain forwards, family by family."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from foreword.backbone.attach import attached, compiled, no_prompt
from foreword.backbone.choose import Layout, choose_layout
from foreword.backbone.forward import run as forward
from foreword.backbone.generate import Sampling, generate
from foreword.backbone.kv import Geometry
from foreword.backbone.layout import pack, right_padded, weighted
from foreword.backbone.load import Backbone
from foreword.backbone.virtual import VirtualTokens
from foreword.config import Member, PromptConfig, TrainConfig
from foreword.data.encode import common_opening
from foreword.errors import ForewordError
from foreword.evaluation.scoring import score_branches
from foreword.prompts.methods.base import Start
from foreword.prompts.methods.prefix_tuning import PrefixTuning
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment
from foreword.training import prepare
from foreword.training.loop import Hooks, train
from foreword.training.prepare import prepared
from foreword.training.state import Population, make_plan, start

P = 5
ATTENTIVE = [f for f in tiny.FAMILIES if f != "mamba"]
LABELS = ((10, 11, 0), (12, 0), (10, 0))
CONTEXTS = [(5, 6, 7, 9, 30), (5, 6, 41), (5, 6, *range(50, 72)), (5, 6, 7, 8)]
MEMBERS = (Member("text", 0, 0.01), Member("text", 1, 0.03))
CONFIG = TrainConfig(epochs=2, batch_size=3)


def rows_of(count: int = P, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))


def random_prefix(backbone: Backbone, seed: int = 0) -> SoftPrompt:
    values = torch.randn(P, backbone.geometry.width, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(values.to(backbone.dtype), "prefix")


def plain(backbone: Backbone, prompt: SoftPrompt, context: tuple[int, ...], branch: tuple[int, ...]) -> torch.Tensor:
    """Reference: one row through the model's own forward with transformers' cache, all logits."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, (keys, values) in enumerate(backbone.geometry.layered(prompt.values[None])):
        cache.update(keys, values, i)
    ids = torch.tensor([[*context, *branch]])
    logits = backbone.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].log_softmax(-1)
    return torch.stack([logits[len(context) - 1 + i, t] for i, t in enumerate(branch)])


# --- one value, every layout ------------------------------------------------------------------


@pytest.mark.parametrize("family", ATTENTIVE)
def test_compiled_rows_are_the_same_soft_prompt(family: str) -> None:
    backbone = tiny.backbone(family, torch.float32)
    rows = SoftPrompt(rows_of())
    prefix = SoftPrompt(compiled(backbone, rows.values), "prefix")
    score = choose_layout(backbone, rows, [Segment(c, LABELS) for c in tiny.front(CONTEXTS, P)], gradient=False).score
    expected = score_branches(backbone, rows, tiny.front(CONTEXTS, P), [LABELS] * 4, score)
    layout = choose_layout(backbone, prefix, [Segment(c, LABELS) for c in CONTEXTS], gradient=False).score
    found = score_branches(backbone, prefix, CONTEXTS, [LABELS] * 4, layout)
    np.testing.assert_allclose(found.full, expected.full, atol=2e-4)
    bare = score_branches(backbone, no_prompt(backbone), CONTEXTS, [LABELS] * 4, layout)
    assert not np.allclose(found.full, bare.full, atol=1e-2), "else the equality would say nothing"


@pytest.mark.parametrize("family", ATTENTIVE)
@pytest.mark.parametrize("layout", ["packed", "shared", "rows"])
def test_a_prefix_scores_as_plain_rows_in_every_layout(family: str, layout: Layout) -> None:
    if family == "bloom" and layout == "packed":
        pytest.skip("its position bias comes from a 2-D mask: never packed")
    backbone = tiny.backbone(family, torch.float32)
    prompt = random_prefix(backbone)
    found = score_branches(backbone, prompt, CONTEXTS, [LABELS] * 4, layout)
    for i, context in enumerate(CONTEXTS):
        for c, label in enumerate(LABELS):
            expected = float(plain(backbone, prompt, context, label).sum())
            if layout == "shared" and getattr(backbone.config, "sliding_window", None):
                continue  # pads count as places there: the self-check never chooses it for these families
            assert found.full[i, c] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "mistral-window", "gpt2", "bloom", "qwen3"])
def test_generation_with_a_prefix_does_not_depend_on_the_batch(family: str) -> None:
    backbone = tiny.backbone(family, torch.float32)
    rows = rows_of()
    prefix = SoftPrompt(compiled(backbone, rows), "prefix")
    sampling = Sampling(max_new_tokens=10)
    found = generate(backbone, prefix, CONTEXTS, sampling)
    assert found == [generate(backbone, prefix, [c], sampling)[0] for c in CONTEXTS]
    assert found == generate(backbone, SoftPrompt(rows), tiny.front(CONTEXTS, P), sampling)
    assert len({tuple(t) for t in found}) > 1


def test_models_a_prefix_cannot_stand_in_front_of_are_refused_by_name() -> None:
    with pytest.raises(ForewordError, match="recurrent"):
        _ = tiny.backbone("mamba").geometry
    shared = tiny.backbone("llama-gqa")
    shared.model.config.num_kv_shared_layers = 1
    with pytest.raises(ForewordError, match="share or differ"):
        _ = shared.geometry


def test_values_come_back_from_the_cache_in_pefts_order() -> None:
    geometry = Geometry(2, 3, 4)
    values = torch.randn(2, P, geometry.width)
    layers = geometry.layered(values)
    assert [tuple(t.shape) for t in layers[0]] == [(2, 3, P, 4)] * 2
    for b in range(2):
        mine = [(keys[b : b + 1], found[b : b + 1]) for keys, found in layers]
        assert torch.equal(geometry.flat(mine), values[b])


# --- training ---------------------------------------------------------------------------------


def examples(kind: str = "prefix") -> list[Segment]:
    made = [Segment((5, 6, *range(20 + i, 22 + 2 * i)), (((10, 11, 0), (12, 0))[i % 2],)) for i in range(7)]
    return [Segment(c, s.branches) for s in made for c in tiny.front([s.context], P if kind == "rows" else 0)]


def begin(backbone: Backbone, members: tuple[Member, ...] = MEMBERS, config: TrainConfig = CONFIG) -> Population:
    methods = [
        PrefixTuning(Start(random_prefix(backbone, m.seed).values * 0.3), PromptConfig(), torch.Generator())
        for m in members
    ]
    return start(methods, members, config, make_plan(7, config), backbone.device)


def go(
    backbone: Backbone, population: Population, layout: Layout, config: TrainConfig = CONFIG, **kw: Any
) -> list[Any]:
    events: list[Any] = []
    with prepared(backbone, kw.pop("rows", examples()), population, config, layout, **kw) as ready:
        train(ready.engine, ready.segments, population, config, Hooks(on_event=events.append))
    return events


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama-gqa", "packed"), ("gemma3", "packed"), ("gpt2", "packed"), ("bloom", "rows"), ("gemma2", "packed")],
)
def test_a_step_on_a_prefix_is_plain_torch(family: str, layout: Layout) -> None:
    backbone = tiny.backbone(family, torch.float64)
    population = begin(backbone, MEMBERS[:1])
    values = population.states[0].method().detach().double().requires_grad_()
    batch = [examples()[i] for i in population.plan.batch(0, 0)]
    logprobs = [plain(backbone, SoftPrompt(values, "prefix"), s.context, s.branches[0]) for s in batch]
    loss = -torch.cat(logprobs).mean()
    (slope,) = torch.autograd.grad(loss, values)
    events = go(backbone, population, layout)
    assert events[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert events[0]["grad_norm"] == pytest.approx(float(slope.norm()), rel=1e-4)


@pytest.mark.parametrize(("family", "layout"), [("llama-gqa", "packed"), ("bloom", "rows")])
@pytest.mark.parametrize("change", [{}, {"recompute": True}, {"token_budget": 40}, {"static": True}])
def test_prefixes_train_together_as_alone(
    family: str, layout: Layout, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    change = dict(change)
    if change.pop("static", False):  # the shapes that a graph would be captured in
        monkeypatch.setattr(prepare, "choose_engine", lambda *args: "graph")
    backbone = tiny.backbone(family, torch.float64)
    config = dataclasses.replace(CONFIG, **change)
    together = begin(backbone, config=config)
    go(backbone, together, layout, config)
    for k, member in enumerate(MEMBERS):
        alone = begin(backbone, (member,))
        go(backbone, alone, layout)
        torch.testing.assert_close(together.states[k].kept(), alone.states[0].kept(), atol=1e-5, rtol=1e-5)


# --- weighted targets -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_soft_targets_and_targets_in_the_opening_equal_plain_rows(layout: Layout) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float64)
    table = rows_of().double().requires_grad_()
    opening = (*range(tiny.VOCAB, tiny.VOCAB + P), 5)
    segments = [
        Segment((6, 7), ((10, 11),), (((10, 20, 30), (0.5, 0.3, 0.2)), ((11,), (1.0,)))),
        Segment((9, 8, 7), ((12, 0),)),
    ]
    make = pack if layout == "packed" else right_padded
    row = weighted(make([(opening, segments)]), segments, [(2, 40, 2.0), (4, 41, 0.5)])
    with VirtualTokens(backbone.embedding, table):
        found = forward(backbone, row)
    (gradient,) = torch.autograd.grad(found.sum(), table)

    def logits(ids: tuple[int, ...]) -> torch.Tensor:
        embedded = torch.cat([table, backbone.embedding(torch.tensor(ids))])[None]
        out: torch.Tensor = backbone.model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
        return out

    first, second = logits((5, 6, 7, 10)), logits((5, 9, 8, 7, 12))
    expected = torch.stack([
        0.5 * first[7, 10] + 0.3 * first[7, 20] + 0.2 * first[7, 30], first[8, 11],
        second[8, 12], second[9, 0], 2 * first[2, 40], 0.5 * first[4, 41],
    ])  # fmt: skip
    (slope,) = torch.autograd.grad(expected.sum(), table)
    torch.testing.assert_close(found, expected.detach().float(), atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("budget", [0, 30])
def test_targets_in_the_opening_count_once_a_row_however_steps_are_split(layout: Layout, budget: int) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float64)
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=7, token_budget=budget)
    population = start([tiny.soft(rows_of())], MEMBERS[:1], config, make_plan(7, config), backbone.device)
    leads = [(1, 40, 1.0), (3, 41, 0.25)]
    rows = examples("rows")
    (event,) = go(backbone, population, layout, config, rows=rows, leads=leads)
    assert len(common_opening([s.context for s in rows])) >= P
    table = rows_of().double()
    total, count = torch.zeros(()), 0
    for s in rows:
        text = torch.tensor([*s.context[P:], *s.branches[0]])
        embedded = torch.cat([table, backbone.embedding(text)])[None]
        logits = backbone.model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
        own = [logits[len(s.context) - 1 + i, t] for i, t in enumerate(s.branches[0])]
        total = total - sum(own) - sum(w * logits[at, t] for at, t, w in leads)
        count += len(own) + len(leads)
    assert event["loss"] == pytest.approx(float(total) / count, abs=1e-5)


def test_the_prefix_of_a_context_manager_is_gone_behind_it() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    with attached(backbone, random_prefix(backbone)) as prefix:
        assert prefix is not None
        assert prefix.size == P
    assert not backbone.embedding._forward_hooks
    assert all(torch.equal(before[k], v) for k, v in backbone.model.state_dict().items())
