"""Packed, shared and right-padded forwards against plain one-row forwards, family by family."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from foreword.backbone import head
from foreword.backbone.choose import choose_layout
from foreword.backbone.forward import (
    compute_prefix,
    micro_batches,
    packed_logprobs,
    rows_logprobs,
    shared_logprobs,
)
from foreword.backbone.layout import pack, visible
from foreword.backbone.load import Backbone, load_backbone
from foreword.backbone.virtual import VirtualTokens
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt
from foreword.records import Segment

PACKING = ["llama-gqa", "gpt2", "gpt-neox", "gemma3", "gemma2", "mistral-window", "qwen3", "opt", "gptj"]
SHARING = [*PACKING, "bloom"]
OPENING_IDS = (7, 8)
SEGMENTS = [
    Segment((5, 6, 7, 9, 30), ((10, 11, 0), (10, 13, 0), (12, 0))),
    Segment((40,), ((10, 11, 0), (10, 13, 0), (12, 0))),
    Segment(tuple(range(50, 72)), ((10, 11, 0), (10, 13, 0), (12, 0))),
]

IN_FRONT = [Segment(c, s.branches) for s in SEGMENTS for c in tiny.front([s.context], 5)]


def plain(
    backbone: Backbone, table: torch.Tensor, opening: tuple[int, ...], segments: Sequence[Segment] = SEGMENTS
) -> torch.Tensor:
    """Reference: hand-made embeddings, one row and branch at a time, all logits, log_softmax."""
    found = []
    for segment in segments:
        for branch in segment.branches:
            text = torch.tensor([[*opening, *segment.context, *branch]])
            embedded = torch.cat([table[None].to(backbone.dtype), backbone.embedding(text)], dim=1)
            logits = backbone.model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
            start = table.shape[0] + text.shape[1] - len(branch)
            found += [logits[start + i - 1, t] for i, t in enumerate(branch)]
    return torch.stack(found)


def table_of(backbone: Backbone, count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, backbone.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("family", PACKING)
def test_packed_loss_and_gradient_equal_plain_rows(family: str) -> None:
    backbone, table = tiny.backbone(family), table_of(tiny.backbone(family))
    expected = plain(backbone, table, OPENING_IDS)
    (slope,) = torch.autograd.grad(expected.sum(), table)
    with VirtualTokens(backbone.embedding, table) as virtual:
        found = packed_logprobs(backbone, [([*virtual.ids, *OPENING_IDS], SEGMENTS)])
    (gradient,) = torch.autograd.grad(found.sum(), table)
    torch.testing.assert_close(found, expected.detach().float(), atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", PACKING)
def test_rows_with_prompts_of_their_own_do_not_meet(family: str) -> None:
    backbone = tiny.backbone(family)
    table = table_of(backbone, 8)
    rows = [(0, 3, SEGMENTS), (3, 5, SEGMENTS[:1]), (5, 8, SEGMENTS[1:])]
    with VirtualTokens(backbone.embedding, table) as virtual:
        found = packed_logprobs(backbone, [(virtual.ids[a:b], segments) for a, b, segments in rows])
    (gradient,) = torch.autograd.grad(found.sum(), table)
    expected = torch.cat([plain(backbone, table[a:b], (), segments) for a, b, segments in rows])
    (slope,) = torch.autograd.grad(expected.sum(), table)
    torch.testing.assert_close(found, expected.detach().float(), atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_head_alone_is_what_every_family_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny.backbone(family)
    assert backbone.knows_head
    table = table_of(backbone)
    monkeypatch.setattr(head, "CHUNK_NUMBERS", 4 * tiny.VOCAB)  # several chunks
    with VirtualTokens(backbone.embedding, table) as virtual:
        found = rows_logprobs(backbone, [([*virtual.ids, *OPENING_IDS], SEGMENTS)])
        (gradient,) = torch.autograd.grad(found.sum(), table)
        with torch.no_grad():
            scored = rows_logprobs(backbone, [([*virtual.ids, *OPENING_IDS], SEGMENTS)])
    expected = plain(backbone, table, OPENING_IDS)
    (slope,) = torch.autograd.grad(expected.sum(), table)
    torch.testing.assert_close(gradient, slope, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored, found.detach(), atol=1e-5, rtol=1e-5, check_dtype=False)


def test_a_head_we_do_not_know_is_left_to_the_model() -> None:
    backbone = tiny.backbone("llama-gqa")
    forward = backbone.model.forward

    @functools.wraps(forward)
    def scaled(*args: object, **kwargs: object) -> object:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    backbone.model.forward = scaled
    table = table_of(backbone)
    with VirtualTokens(backbone.embedding, table) as virtual:
        found = packed_logprobs(backbone, [([*virtual.ids, *OPENING_IDS], SEGMENTS)])
    assert not backbone.knows_head
    expected = plain(backbone, table, OPENING_IDS)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_right_padded_rows_equal_plain_rows(family: str) -> None:
    backbone, table = tiny.backbone(family), table_of(tiny.backbone(family))
    with VirtualTokens(backbone.embedding, table) as virtual:
        found = rows_logprobs(backbone, [([*virtual.ids, *OPENING_IDS], SEGMENTS)])
    expected = plain(backbone, table, OPENING_IDS)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize("family", SHARING)
def test_shared_contexts_equal_plain_rows(family: str) -> None:
    # float32: eager attention softmaxes in float32, where float64's lowest number is -inf.
    backbone = tiny.backbone(family, torch.float32)
    table = table_of(backbone)
    with torch.no_grad(), VirtualTokens(backbone.embedding, table.float()) as virtual:
        found = shared_logprobs(backbone, [([*virtual.ids, *OPENING_IDS], SEGMENTS)])
    expected = plain(backbone, table, OPENING_IDS)
    torch.testing.assert_close(found, expected.detach(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", PACKING)
@pytest.mark.parametrize("virtual_tokens", [5, 20])  # 20: the opening is longer than the window
def test_a_cached_opening_changes_nothing(family: str, virtual_tokens: int) -> None:
    backbone = tiny.backbone(family)
    table = table_of(backbone, virtual_tokens)
    with torch.no_grad(), VirtualTokens(backbone.embedding, table) as virtual:
        start = [*virtual.ids, *OPENING_IDS]
        prefix = compute_prefix(backbone, start)
        once = packed_logprobs(backbone, [((), SEGMENTS)], prefix)
        again = packed_logprobs(backbone, [((), SEGMENTS)], prefix)
    expected = plain(backbone, table, OPENING_IDS)
    torch.testing.assert_close(once, expected.detach().float(), atol=1e-5, rtol=1e-5, check_dtype=False)
    assert torch.equal(once, again), "a forward pass must not write into the shared prefix"


@pytest.mark.parametrize(
    ("family", "train", "score"),
    [(f, "packed", "packed") for f in PACKING] + [("bloom", "rows", "shared"), ("mamba", "rows", "rows")],
)
def test_each_family_gets_its_layout(family: str, train: str, score: str) -> None:
    backbone = tiny.backbone(family, torch.float32)
    choice = choose_layout(backbone, SoftPrompt(table_of(backbone).detach().float()), IN_FRONT)
    assert (choice.train, choice.score) == (train, score), choice.reason


@pytest.mark.parametrize("count", [1, 2, 3])  # one row: its label words must not see each other
def test_a_model_that_ignores_the_mask_is_found_out(count: int) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    forward = backbone.model.model.forward
    backbone.model.model.forward = lambda *a, attention_mask=None, **k: forward(*a, **k)
    choice = choose_layout(backbone, SoftPrompt(table_of(backbone).detach().float()), IN_FRONT[:count])
    assert choice.train == "rows"
    assert "does not take a packed row" in choice.reason


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_text_rows_equal_the_hard_prompt_and_leave_the_model_as_it_was(family: str) -> None:
    backbone = tiny.backbone(family)
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    hard, text = [21, 22, 23, 24], [30, 31, 32]
    table = backbone.embedding(torch.tensor(hard))
    with VirtualTokens(backbone.embedding, table) as virtual:
        soft = backbone.model(input_ids=torch.tensor([[*virtual.ids, *text]]), use_cache=False).logits
    plain_logits = backbone.model(input_ids=torch.tensor([[*hard, *text]]), use_cache=False).logits
    assert torch.equal(soft, plain_logits)
    assert all(torch.equal(before[k], v) for k, v in backbone.model.state_dict().items())
    assert not backbone.embedding._forward_hooks
    assert not backbone.embedding._forward_pre_hooks


@pytest.mark.filterwarnings("ignore")  # flex_attention warns that it runs without torch.compile
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "mistral-window"])
def test_block_sparse_attention_sees_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import flex_attention

    # On a CPU only the plain operator runs here, forward; transformers compiles it.
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", _plain_flex)
    backbone = tiny.backbone(family, torch.float32)
    table = table_of(backbone, 20).detach().float()
    expected = plain(backbone, table, OPENING_IDS)
    backbone.model.set_attn_implementation("flex_attention")
    with torch.no_grad(), VirtualTokens(backbone.embedding, table) as virtual:
        start = [*virtual.ids, *OPENING_IDS]
        whole = packed_logprobs(backbone, [(start, SEGMENTS)])
        cached = packed_logprobs(backbone, [((), SEGMENTS)], compute_prefix(backbone, start))
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(cached, expected, atol=2e-5, rtol=2e-5)


def _plain_flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, training: bool = False, **kwargs: object
) -> object:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, **kwargs)  # type: ignore[arg-type]


def test_block_sparse_attention_is_refused_without_cuda() -> None:
    with pytest.raises(ForewordError, match="CUDA only"):
        load_backbone(ModelConfig("none", device="cpu", attention="flex_attention"))


segments = st.lists(
    st.builds(
        Segment,
        st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=100)
@given(st.lists(segments, min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 3), st.none() | st.integers(1, 6))
def test_each_target_sees_its_own_text_and_nothing_else(
    rows: list[list[Segment]], cached: int, fed: int, window: int | None
) -> None:
    opening = [101 + i for i in range(fed)]
    row = pack([(opening, found) for found in rows], cached)
    see = visible(row, window)
    assert row.positions is not None
    width = row.ids.shape[1]
    assert see.shape == (len(rows), width, cached + width)
    assert see.any(-1).all(), "a query that sees nothing is NaN"
    wanted = [
        (r, s.context, b, i) for r, found in enumerate(rows) for s in found for b in s.branches for i in range(len(b))
    ]
    assert len(wanted) == len(row.place) == len(row.targets)
    for m, (r, context, branch, i) in enumerate(wanted):
        at = int(row.keep[row.place[m]]) - r * width
        assert row.targets[m] == branch[i]
        seen = see[r, at].nonzero()[:, 0].tolist()
        positions = [*range(cached), *row.positions[r].tolist()]
        text = [*([-1] * cached), *opening, *context, *branch[:i]]
        near = range(max(0, len(text) - window), len(text)) if window else range(len(text))
        assert [positions[j] for j in seen] == list(near)
        assert [-1 if j < cached else int(row.ids[r, j - cached]) for j in seen] == [text[p] for p in near]


def test_branches_share_their_beginnings() -> None:
    words = [(1, 2, 3, 0), (1, 2, 4, 0), (1, 5, 0), (6, 0)]
    row = pack([((), [Segment((9,), tuple(words))])])
    assert row.ids[0].tolist() == [9, 1, 2, 3, 4, 5, 6], "each node of the trie once, depth first"
    assert len(row.keep) == 7
    assert len(row.targets) == sum(map(len, words))


@settings(deadline=None, max_examples=60)
@given(segments, st.integers(0, 5), st.integers(1, 30))
def test_micro_batches_keep_order_and_budget(given_segments: list[Segment], opening: int, budget: int) -> None:
    runs = list(micro_batches(given_segments, opening, budget))
    assert [i for run in runs for i in run] == list(range(len(given_segments)))
    for run in runs:
        assert len(run) == 1 or opening + sum(given_segments[i].tokens for i in run) <= budget
