"""Label scoring against plain forwards: any batch, any layout, with and without the end token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from foreword.backbone.attach import compiled, no_prompt
from foreword.backbone.choose import Layout
from foreword.backbone.load import Backbone
from foreword.evaluation.evaluate import pooled, run_rows, scores_of, validation_scores
from foreword.evaluation.scoring import class_probabilities, classify, needs_end, score_branches
from foreword.evaluation.together import classify_together
from foreword.prompts.soft import Kind, SoftPrompt
from foreword.records import Example

LABELS = ((10, 11, 0), (12, 0), (10, 0))
CONTEXTS = [(5, 6, 7, 9, 30), (5, 6, 41), (5, 6, *range(50, 72)), (5, 6, 7, 8)]


def reference(backbone: Backbone, table: torch.Tensor, context: tuple[int, ...], branch: tuple[int, ...]) -> float:
    ids = torch.tensor([[*context, *branch]])
    embedded = torch.cat([table[None], backbone.embedding(ids)], dim=1)
    logits = backbone.model(inputs_embeds=embedded, use_cache=False).logits[0].log_softmax(-1)
    at = table.shape[0] + len(context) - 1
    return float(sum(logits[at + i, t] for i, t in enumerate(branch)))


@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama-gqa", "packed"), ("gemma3", "packed"), ("gpt2", "packed"), ("bloom", "shared"), ("mamba", "rows")],
)
@pytest.mark.parametrize("virtual_tokens", [0, 6])
def test_scores_equal_plain_forwards_in_input_order(family: str, layout: Layout, virtual_tokens: int) -> None:
    backbone = tiny.backbone(family, torch.float32)
    table = torch.randn(virtual_tokens, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    found = score_branches(
        backbone, SoftPrompt(table), tiny.front(CONTEXTS, virtual_tokens), [LABELS] * len(CONTEXTS), layout
    )
    for i, context in enumerate(CONTEXTS):
        for c, label in enumerate(LABELS):
            assert found.full[i, c] == pytest.approx(reference(backbone, table, context, label), abs=1e-4)
            assert found.words[i, c] == pytest.approx(reference(backbone, table, context, label[:-1]), abs=1e-4)


def test_a_row_scores_the_same_alone_and_in_any_batch() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    prompt = SoftPrompt(torch.randn(4, tiny.HIDDEN, generator=torch.Generator().manual_seed(0)))
    contexts = tiny.front(CONTEXTS, 4)
    together = classify(backbone, prompt, contexts, LABELS, "packed")
    alone = np.concatenate([classify(backbone, prompt, [c], LABELS, "packed") for c in contexts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "prefix"])
@pytest.mark.parametrize(
    ("family", "layout"), [("llama-gqa", "packed"), ("gemma3", "packed"), ("gpt2", "packed"), ("bloom", "shared")]
)
def test_soft_prompts_in_the_same_passes_say_what_each_says_alone(family: str, layout: Layout, kind: Kind) -> None:
    backbone = tiny.backbone(family, torch.float32)
    tables = [torch.randn(5, tiny.HIDDEN, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    values = [compiled(backbone, t) for t in tables] if kind == "prefix" and family != "bloom" else tables
    kind = kind if family != "bloom" else "rows"
    prompts = [SoftPrompt(v, kind) for v in values]
    for shared in (True, False):  # with and without an opening that all contexts have in common
        rows = CONTEXTS if shared else [(i + 3, *c) for i, c in enumerate(CONTEXTS)]
        contexts = tiny.front(rows, 5) if kind == "rows" else rows
        together = classify_together(backbone, prompts, contexts, LABELS, layout)
        for prompt, found in zip(prompts, together, strict=True):
            np.testing.assert_allclose(found, classify(backbone, prompt, contexts, LABELS, layout), atol=1e-5)
        assert not np.allclose(together[0], together[1], atol=1e-3)


def test_the_end_token_counts_where_one_label_begins_another() -> None:
    assert needs_end(LABELS)
    assert not needs_end(((10, 11, 0), (12, 0)))
    backbone = tiny.backbone("llama-gqa", torch.float32)
    scores = score_branches(backbone, no_prompt(backbone), CONTEXTS, [LABELS] * 4, "packed")
    assert not np.allclose(class_probabilities(scores, True), class_probabilities(scores, False))
    np.testing.assert_allclose(class_probabilities(scores, True).sum(1), 1.0)


def test_rows_scored_in_folds_pool_to_rows_scored_at_once() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    examples = [Example(i, c, LABELS[i % 3], i % 3) for i, c in enumerate(CONTEXTS)]
    empty = no_prompt(backbone)
    whole = scores_of(run_rows(backbone, empty, examples, LABELS, "packed"), ["a", "b", "c"])
    halves = [run_rows(backbone, empty, part, LABELS, "packed") for part in (examples[:2], examples[2:])]
    assert scores_of(pooled(halves), ["a", "b", "c"])["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert scores_of(pooled(halves), ["a", "b", "c"])["accuracy"] == whole["accuracy"]
    brief = validation_scores(pooled(halves))
    assert brief == pytest.approx({k: whole[k] for k in ("loss", "accuracy", "macro_f1")}, abs=1e-5)


def test_free_text_is_scored_by_greedy_match_and_token_loss() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    empty = no_prompt(backbone)
    from foreword.backbone.generate import Sampling, generate

    said = generate(backbone, empty, [CONTEXTS[0]], Sampling(max_new_tokens=4))[0]
    right = Example(1, CONTEXTS[0], (*said, 0)[:4], None, backbone.tokenizer.decode(said))
    wrong = Example(2, CONTEXTS[1], (10, 11, 10, 0), None, "something else")
    outcome = run_rows(backbone, empty, [right, wrong], (), "packed")
    assert outcome.matches.tolist() == [1.0, 0.0]
    scores = scores_of(outcome, ())
    expected = [reference(backbone, empty.values, e.context, e.target) for e in (right, wrong)]
    assert scores["loss"] == pytest.approx(-sum(expected) / 8, abs=1e-4)
