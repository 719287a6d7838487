"""BLEU and chrF against sacrebleu called directly, ROUGE-L against plain definitions; inputs with several targets."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

import foreword
import tiny
from conftest import Cli, write_csv
from foreword.backbone.attach import no_prompt
from foreword.evaluation.evaluate import pooled, run_rows, scores_of
from foreword.evaluation.rouge import common_subsequence, rouge_l
from foreword.evaluation.text_metrics import exact_matches, text_scores
from foreword.records import Example

thorough = settings(max_examples=150, deadline=None)
WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "dog's", "Äpfel"]), max_size=12)
TEXTS = WORDS.map(" ".join)
RATED = st.lists(st.tuples(TEXTS, st.lists(TEXTS.filter(bool), min_size=1, max_size=4)), min_size=1, max_size=6)
SAID = ["the cat sat on the mat .", "a dog barked at the moon", ""]
WANTED = [["the cat is on the mat .", "there is a cat on the mat ."], ["the dog barked at a moon"], ["it is late"]]


def longest_common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """The textbook's recursion."""

    @cache
    def of(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + of(i + 1, j + 1) if a[i] == b[j] else max(of(i + 1, j), of(i, j + 1))

    return of(0, 0)


@thorough
@given(WORDS, WORDS)
def test_the_common_subsequence_is_the_textbooks(a: list[str], b: list[str]) -> None:
    assert common_subsequence(a, b) == longest_common(tuple(a), tuple(b))


@thorough
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_rouge_l_is_the_best_harmonic_mean_of_precision_and_recall(text: str, references: list[str]) -> None:
    said, best = tuple(text.lower().replace("'", " ").split()), 0.0
    for reference in references:
        wanted = tuple(reference.lower().replace("'", " ").split())
        if common := longest_common(said, wanted):
            precision, recall = common / len(said), common / len(wanted)
            best = max(best, 2 * precision * recall / (precision + recall))
    assert rouge_l(text, references) == pytest.approx(best)


def test_rouge_l_of_lins_example() -> None:
    # Section 3.1 of the paper: S2 has three of the four words in order, S3 two.
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == 3 / 4
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == 2 / 4


def test_rouge_l_reads_any_script_and_no_case_or_punctuation() -> None:
    assert rouge_l("Große, ÄRGER 12! 日本", ["GROSSE ärger 12 日本"]) == 1
    assert rouge_l("... -- _", ["word"]) == rouge_l("", ["word"]) == rouge_l("", [""]) == 0


@settings(max_examples=30, deadline=None)  # every example resamples a thousand times
@given(RATED)
def test_bleu_and_chrf_are_sacrebleus(rated: list[tuple[str, list[str]]]) -> None:
    texts, references = [t for t, _ in rated], [r for _, r in rated]
    most = max(map(len, references))
    streams = [[own[k] if k < len(own) else None for own in references] for k in range(most)]
    found = text_scores(texts, references)
    assert found["bleu"] == BLEU().corpus_score(texts, streams).score
    assert found["chrf"] == CHRF().corpus_score(texts, streams).score
    for key, top in (("bleu", 100), ("chrf", 100), ("rouge_l", 1), ("exact_match", 1)):
        low, high = found["intervals"][key]
        assert 0 <= low <= high <= top + 1e-9


def test_the_interval_is_that_of_sacrebleus_own_bootstrap() -> None:
    rng = np.random.default_rng(0)
    vocabulary = ["the", "a", "cat", "dog", "sat", "lay", "on", "under", "mat", "moon"]
    wanted = [" ".join(rng.choice(vocabulary, 12)) for _ in range(80)]
    said = [" ".join(w if rng.random() < 0.8 else "x" for w in text.split()) for text in wanted]
    for key, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        theirs = metric.corpus_score(said, [wanted], n_bootstrap=1000)
        low, high = text_scores(said, [[w] for w in wanted])["intervals"][key]
        assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.1)
        assert (high + low) / 2 == pytest.approx(theirs._mean, abs=float(theirs._ci) / 5)


def test_one_reference_more_never_harms_and_any_of_them_may_match() -> None:
    one, several = text_scores(SAID, [[own[0]] for own in WANTED]), text_scores(SAID, WANTED)
    assert several["bleu"] >= one["bleu"]
    assert several["rouge_l"] >= one["rouge_l"]
    assert exact_matches(["late ", "x"], [["early", " late"], ["y", "z"]]).tolist() == [1, 0]
    assert several["contexts"] == 3
    assert "nrefs:var" in several["signatures"]["bleu"]
    assert text_scores(["a b c d e"], [["b", "a b c d e"]])["bleu"] == pytest.approx(100)


def test_nothing_written_scores_nothing() -> None:
    found = text_scores(["", ""], [["a b"], ["c", "d"]])
    assert [found[k] for k in ("exact_match", "bleu", "chrf", "rouge_l")] == [0, 0, 0, 0]
    low, high = found["intervals"].pop("exact_match")
    assert low == 0 < high < 1  # two texts do not show that none will ever match
    assert all(bounds == [0, 0] for bounds in found["intervals"].values())


# --- rows that share an input -------------------------------------------------------------------

SHARED = [
    Example(1, (30, 31, 32), (60, 61, 0), None, "one way"),
    Example(2, (33, 34), (62, 0), None, "other"),
    Example(3, (30, 31, 32), (63, 64, 65, 0), None, "another way"),
    Example(4, (30, 31, 32), (60, 61, 0), None, "one way"),
]


def test_an_input_with_several_targets_is_written_once_and_read_for_every_target() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    done: list[int] = []
    outcome = run_rows(backbone, no_prompt(backbone), SHARED, (), "packed", done.append)
    assert len(outcome.texts) == 2
    assert outcome.references == [["one way", "another way"], ["other"]]
    assert outcome.firsts == [0, 1]
    assert sum(done) == len(outcome.logprobs) == 4
    single = run_rows(backbone, no_prompt(backbone), SHARED[:1] + SHARED[2:3], (), "packed")
    assert outcome.texts[0] == single.texts[0]
    scores = scores_of(outcome, ())
    assert (scores["n"], scores["contexts"]) == (4, 2)
    assert scores["loss"] == pytest.approx(-sum(outcome.logprobs) / (3 + 2 + 4 + 3))


def test_folds_pool_their_texts_and_know_their_rows() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    parts = [run_rows(backbone, no_prompt(backbone), part, (), "packed") for part in (SHARED[:2], SHARED[2:])]
    both = pooled(parts)
    assert both.texts == parts[0].texts + parts[1].texts
    assert both.firsts == [0, 1, 2]
    assert both.references[2] == ["another way", "one way"]


def test_scores_of_free_text_are_shown_everywhere(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    rows = [("name[fox]", "the fox"), ("name[fox]", "it is the fox"), ("name[dog]", "the lazy dog")]
    data = write_csv(tmp_path / "rows.csv", rows, ("text", "label"))
    task = foreword.train(
        out=tmp_path / "run", model=str(model_folder), data={"path": str(data), "task": "generate"},
        eval_data=str(data), text="text", label="label", prompt={"virtual_tokens": 4}, train={"epochs": 1}, quiet=True,
    )  # fmt: skip
    assert task.scores["contexts"] == 2
    code, said, err = cli("evaluate", tmp_path / "run", "--data", data, "--json", tmp_path / "s.json")
    assert code == 0, err
    shown = cli("show", tmp_path / "run")[1]
    card = (tmp_path / "run" / "README.md").read_text()
    for text in (said, shown, card):
        assert all(
            title in text for title in ("exact match", "BLEU", "ROUGE-L", "loss", "3 rows of 2 different inputs")
        )
        assert "macro-F1" not in text
    assert all(line == line[:80] for line in said.splitlines() if "[" in line)
    assert task.scores["signatures"]["bleu"] in card
    scores = json.loads((tmp_path / "s.json").read_text())
    assert set(scores["intervals"]) == {"exact_match", "bleu", "chrf", "rouge_l", "loss", "perplexity"}
    assert "bleu" in scores["baselines"]["zero_shot"]
