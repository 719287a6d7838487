"""Initialisers against plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

import tiny
from foreword.errors import ForewordError
from foreword.prompts import initialisers as init

TABLE = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 0.3


def embed(ids: Sequence[int]) -> torch.Tensor:
    return TABLE[list(ids)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 9])
def test_text_is_tiled_and_cut_as_in_peft(n: int) -> None:
    ids = [5, 8, 13]
    tiled = (ids * -(-n // 3))[:n]  # peft/tuners/prompt_tuning/model.py
    assert torch.equal(init.from_text(ids, embed)(n), TABLE[tiled])


def test_class_rows_are_the_means_of_their_words_in_turn() -> None:
    means = [TABLE[[1, 2, 3]].mean(0), TABLE[[4]].mean(0)]
    rows = init.from_class_words([(1, 2, 3), (4,)], embed)(5)
    torch.testing.assert_close(rows, torch.stack([means[i % 2] for i in range(5)]))


def test_vocabulary_rows_are_different_candidates_and_follow_the_seed() -> None:
    candidates = list(range(10, 30))
    rows = init.from_vocabulary(candidates, embed, seeded(1))(20)
    found = [int((row == TABLE).all(1).nonzero()) for row in rows]
    assert sorted(found) == candidates, "sampled without replacement"
    assert found != candidates, "in random order"
    assert torch.equal(rows, init.from_vocabulary(candidates, embed, seeded(1))(20))
    assert not torch.equal(rows, init.from_vocabulary(candidates, embed, seeded(2))(20))


def test_vocabulary_rows_repeat_only_where_there_are_too_few() -> None:
    rows = init.from_vocabulary([3, 4], embed, seeded())(5)
    assert {tuple(r) for r in rows.tolist()} == {tuple(r) for r in TABLE[[3, 4]].tolist()}


def test_random_rows_have_the_norm_of_real_embeddings() -> None:
    rows = init.from_random(TABLE, seeded())(200)
    norms = TABLE.pow(2).sum(1).sqrt()
    torch.testing.assert_close(rows.pow(2).sum(1).sqrt(), norms.mean().expand(200))
    assert rows.mean(0).abs().max() < norms.mean() / 4, "they point everywhere"
    assert torch.equal(rows, init.from_random(TABLE, seeded())(200))


def test_pefts_random_is_a_standard_normal() -> None:
    rows = init.peft_random(6, seeded(3))(2000)
    assert torch.equal(rows, torch.randn(2000, 6, generator=seeded(3)))
    assert abs(float(rows.std()) - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_adapters_rows_are_tiled_or_cut_in_float32(dtype: torch.dtype) -> None:
    rows = TABLE[:4].to(dtype)
    assert torch.equal(init.from_rows(rows)(3), rows[:3].float())
    assert torch.equal(init.from_rows(rows)(6), torch.cat([rows, rows[:2]]).float())


def test_training_on_an_adapters_rows_leaves_the_adapter_alone() -> None:
    rows = TABLE[:4].clone()
    init.from_rows(rows)(4).zero_()
    assert torch.equal(rows, TABLE[:4])


@pytest.mark.parametrize("sizes", [(0, 4), (6, 0), (3, 7), (10,)])
def test_parts_stand_one_after_the_other_in_their_sizes(sizes: tuple[int, ...]) -> None:
    parts = [(lambda n, v=float(i): torch.full((n, 2), v), size) for i, size in enumerate(sizes)]
    rows = init.compose(parts)(10)
    full = [size or 10 - sum(sizes) for size in sizes]
    assert rows[:, 0].tolist() == [float(i) for i, size in enumerate(full) for _ in range(size)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("text", [("text", 0)]),
        ("text:8", [("text", 8)]),
        ("vocabulary+classes:4", [("vocabulary", 0), ("classes", 4)]),
        (" peft-random:3 + adapter:5 ", [("peft-random", 3), ("adapter", 5)]),
        ("random:1+text+classes:6", [("random", 1), ("text", 0), ("classes", 6)]),
    ],
)
def test_names_and_sizes_are_parsed(text: str, parts: list[tuple[str, int]]) -> None:
    assert init.parse_init(text, 8) == parts


@pytest.mark.parametrize(
    "text", ["texts", "", "text+", "text:", "text:-1", "TEXT", "text:x", "prompt:4+text", "text:1.5"]
)
def test_an_unknown_initialiser_names_the_known_ones(text: str) -> None:
    with pytest.raises(ForewordError, match="unknown initialiser") as e:
        init.parse_init(text, 8)
    assert all(name in e.value.fix for name in init.NAMES)
    assert e.value.where == f"prompt.init={text}"


@pytest.mark.parametrize(
    "text", ["text:9", "text:7", "text+random", "text:8+random", "text:4+random:5", "text:0+random"]
)
def test_sizes_that_do_not_add_up_are_refused(text: str) -> None:
    with pytest.raises(ForewordError, match="do not add up to 8 virtual tokens"):
        init.parse_init(text, 8)


def test_nothing_to_start_from_is_an_error() -> None:
    with pytest.raises(ForewordError, match="the text has no tokens"):
        init.from_text([], embed)
    with pytest.raises(ForewordError, match="no classes"):
        init.from_class_words([], embed)


def test_frequent_tokens_are_words_in_merge_order_without_specials() -> None:
    vocab = {"<s>": 0, "word": 1, "Ġtoken": 2, "Ġ": 3, "a": 4, "▁an": 5, "12": 6, "no!": 7, "late": 8, "far": 9}
    assert init.frequent_ids(vocab, special=[0, 8], limit=9) == [1, 2, 5]


def test_frequent_tokens_of_a_real_tokenizer() -> None:
    tokenizer = tiny.tokenizer()
    ids = init.frequent_ids(tokenizer.get_vocab(), tokenizer.all_special_ids, tiny.VOCAB)
    assert ids == sorted(ids)
    assert ids
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert all(len(tokenizer.decode([i]).strip()) > 1 for i in ids)


def test_no_more_than_the_most_frequent_are_candidates() -> None:
    words = ("".join(letters) for letters in itertools.product("abcdefgh", repeat=5))
    vocab = dict(zip(words, range(6000), strict=False))
    assert init.frequent_ids(vocab, [], 6000) == list(range(init.FREQUENT))
