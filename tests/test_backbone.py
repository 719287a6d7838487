"""Loading: frozen, on the chosen device, errors that name the model; generation and fingerprints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import tiny
from foreword.backbone.fingerprint import Fingerprint
from foreword.backbone.generate import Sampling, generate, stream
from foreword.backbone.load import choose_device, load_backbone
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt

GENERATING = ["llama-gqa", "gpt2", "gpt-neox", "bloom", "gemma3", "mistral-window", "opt"]


def test_a_loaded_backbone_is_frozen_and_in_eval_mode(model_folder: Path) -> None:
    backbone = load_backbone(ModelConfig(str(model_folder)))
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert backbone.device.type == "cpu" or torch.cuda.is_available()
    assert (backbone.hidden_size, backbone.vocab_size, backbone.window) == (tiny.HIDDEN, tiny.VOCAB, 512)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_backbone_is_known_again_in_every_dtype(model_folder: Path, dtype: str) -> None:
    first = load_backbone(ModelConfig(str(model_folder))).fingerprint
    other = load_backbone(ModelConfig(str(model_folder), dtype=dtype))
    assert other.dtype == getattr(torch, dtype)
    assert first.differs(other.fingerprint) == ""
    assert Fingerprint.from_dict(first.as_dict()) == first


def test_another_checkpoint_of_the_same_shape_is_told_apart() -> None:
    mine, theirs = tiny.backbone(seed=0).fingerprint, tiny.backbone(seed=1).fingerprint
    assert "weights are others" in mine.differs(theirs)


@pytest.mark.parametrize(
    ("name", "what"),
    [("./nowhere", "no such model folder"), ("/nowhere/at/all", "no such model folder"), ("x.gguf", "no such model")],
)
def test_a_wrong_local_path_never_ends_in_a_hub_error(name: str, what: str) -> None:
    with pytest.raises(ForewordError, match=what) as caught:
        load_backbone(ModelConfig(name))
    assert "repo" not in str(caught.value).lower()


def test_a_near_miss_of_a_folder_is_suggested(model_folder: Path) -> None:
    with pytest.raises(ForewordError) as caught:
        load_backbone(ModelConfig(str(model_folder.parent / "tiny-lama")))
    assert "tiny-llama" in caught.value.fix


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForewordError, match="holds no model"):
        load_backbone(ModelConfig(str(tmp_path)))


def test_a_broken_model_folder_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ForewordError, match="cannot load the model") as caught:
        load_backbone(ModelConfig(str(tmp_path)))
    assert caught.value.where == str(tmp_path)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ForewordError, match="no device"):
        choose_device("cuda:97")
    with pytest.raises(ForewordError, match="no device"):
        choose_device("abacus")


def rows_of(backbone: object, count: int) -> SoftPrompt:
    return SoftPrompt(torch.randn(count, tiny.HIDDEN, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("family", GENERATING)
def test_generation_does_not_depend_on_the_batch(family: str) -> None:
    backbone = tiny.backbone(family, torch.float32)
    table = rows_of(backbone, 4)
    contexts = tiny.front([(5, 6, 7), (8,), tuple(range(40, 60)), (9, 10, 11, 12)], 4)
    sampling = Sampling(max_new_tokens=12)
    together = generate(backbone, table, contexts, sampling)
    assert together == [generate(backbone, table, [c], sampling)[0] for c in contexts]
    assert len({tuple(t) for t in together}) > 1, "rows must differ for this test to see anything"


@pytest.mark.parametrize("family", GENERATING)
def test_greedy_text_equals_a_plain_loop(family: str) -> None:
    backbone = tiny.backbone(family, torch.float32)
    table, context = rows_of(backbone, 4), [5, 6, 7]
    expected: list[int] = []
    for _ in range(8):
        text = backbone.embedding(torch.tensor([[*context, *expected]]))
        logits = backbone.model(inputs_embeds=torch.cat([table.values[None], text], 1), use_cache=False).logits
        expected.append(int(logits[0, -1].argmax()))
    if 0 in expected:
        expected = expected[: expected.index(0)]
    assert generate(backbone, table, tiny.front([context], 4), Sampling(max_new_tokens=8))[0] == expected


def test_sampling_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    table = rows_of(backbone, 2)
    before = torch.random.get_rng_state()
    hot = Sampling(max_new_tokens=10, temperature=5.0, seed=1)
    first = generate(backbone, table, tiny.front([(5, 6)], 2), hot)
    assert first == generate(backbone, table, tiny.front([(5, 6)], 2), hot)
    assert first != generate(backbone, table, tiny.front([(5, 6)], 2), dataclasses.replace(hot, seed=2))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_a_temperature_too_low_to_divide_by_is_greedy(temperature: float) -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    table, contexts = rows_of(backbone, 2), tiny.front([(5, 6)], 2)
    cold = Sampling(max_new_tokens=10, temperature=temperature, top_k=5)
    assert generate(backbone, table, contexts, cold) == generate(backbone, table, contexts, Sampling(max_new_tokens=10))


def test_repetition_penalty_never_indexes_past_the_vocabulary() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    out = generate(
        backbone, rows_of(backbone, 3), tiny.front([(5, 6)], 3), Sampling(max_new_tokens=8, repetition_penalty=50.0)
    )
    assert len(set(out[0])) == len(out[0]), "a penalty of 50 forbids any repetition here"


def test_repetition_penalty_does_not_depend_on_the_batch() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    prompt, sampling = rows_of(backbone, 3), Sampling(max_new_tokens=8, repetition_penalty=1.3)
    contexts = tiny.front([(5, 6), tuple(range(40, 60))], 3)
    assert generate(backbone, prompt, contexts, sampling)[0] == generate(backbone, prompt, contexts[:1], sampling)[0]


def test_streamed_pieces_are_the_generated_text() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    table, sampling = rows_of(backbone, 3), Sampling(max_new_tokens=12)
    (context,) = tiny.front([(40, 41)], 3)
    whole = backbone.tokenizer.decode(generate(backbone, table, [context], sampling)[0])
    pieces = list(stream(backbone, table, context, sampling))
    assert "".join(pieces) == whole


def test_a_failure_while_streaming_reaches_the_reader() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    with pytest.raises(IndexError):
        list(stream(backbone, rows_of(backbone, 2), (-(10**6),), Sampling(max_new_tokens=2)))
