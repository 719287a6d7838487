"""The conformance suite on the embedded engine, over the families it batches."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

import serving_checks as checks
import tiny
from foreword.backbone.load import load_backbone
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.serving.engine import Engine
from foreword.serving.engines.transformers import TransformersConfig, TransformersEngine

SIZES = (4, 1, 9, 6)
Check = Callable[[Engine, checks.Reference], Awaitable[None]]
ALL = [
    checks.check_mixed_batch,
    checks.check_same_text_other_prompt,
    checks.check_salts_share_nothing,
    checks.check_scores,
    checks.check_logprobs,
    checks.check_abort,
    checks.check_reload,
    checks.check_seeds,
    checks.check_refusals,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save(tmp_path_factory.mktemp("serving") / family, family)
        return made[family]

    return folder


def config(folder: Path, **more: object) -> TransformersConfig:
    return TransformersConfig(str(folder), kv_memory=4, prompt_memory=0.1, page=4, **more)  # type: ignore[arg-type]


def run(folder: Path, *wanted: Check, prefixes: bool = True, **more: object) -> None:
    """One engine, one reference of its own weights in memory, the checks in a row."""
    backbone = load_backbone(ModelConfig(str(folder)))

    async def go() -> None:
        engine = TransformersEngine(config(folder, **more))
        capabilities = await engine.start()
        try:
            prompts = checks.prompts_of(backbone, SIZES)
            if prefixes and "prefix" in capabilities.kinds:
                prompts["kv"] = checks.prefix_of(backbone, 5)
            await checks.load(engine, prompts)
            for check in wanted:
                await check(engine, checks.Reference(backbone, prompts))
        finally:
            await engine.close()

    asyncio.run(go())


@pytest.mark.parametrize("check", ALL, ids=lambda c: c.__name__.removeprefix("check_"))
def test_llama(folders: Callable[[str], Path], check: Check) -> None:
    run(folders("llama-gqa"), check)


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "qwen3", "opt", "gemma3", "gemma2", "mistral-window"])
def test_families(folders: Callable[[str], Path], family: str) -> None:
    run(folders(family), checks.check_mixed_batch, checks.check_same_text_other_prompt, checks.check_scores)


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_families_in_rounds(folders: Callable[[str], Path], family: str) -> None:
    """Architectures that transformers does not batch continuously."""
    run(
        folders(family), checks.check_mixed_batch, checks.check_same_text_other_prompt, checks.check_scores,
        checks.check_logprobs, checks.check_abort, checks.check_reload, checks.check_seeds, checks.check_refusals,
    )  # fmt: skip


def test_small_passes_and_a_full_cache(folders: Callable[[str], Path]) -> None:
    """Contexts in several passes, and more requests than the cache of keys and values holds."""
    folder = folders("llama-gqa")
    run(folder, checks.check_mixed_batch, checks.check_same_text_other_prompt, batch_tokens=8, max_running=3)


@pytest.mark.parametrize("family", ["mamba"])
def test_architectures_that_do_not_batch_are_refused_by_name(folders: Callable[[str], Path], family: str) -> None:
    async def start() -> None:
        await TransformersEngine(config(folders(family))).start()

    with pytest.raises(ForewordError, match=family):
        asyncio.run(start())


def test_rows_given_back_come_again_under_other_ids(folders: Callable[[str], Path]) -> None:
    """A table of few rows, filled and emptied many times with the same text: no cached block is mistaken."""
    backbone = load_backbone(ModelConfig(str(folders("llama-gqa"))))

    async def go() -> None:
        engine = TransformersEngine(config(folders("llama-gqa")))
        await engine.start()
        engine.slots.rows.free = engine.slots.rows.free[-8:]
        try:
            for seed in range(12):
                prompts = {f"s{seed}": checks.prompts_of(backbone, [8], seed)["s0"]}
                reference = checks.Reference(backbone, prompts)
                case = checks.Case((*range(tiny.VOCAB, tiny.VOCAB + 8), *range(30, 50)), f"s{seed}")
                await checks.load(engine, prompts)
                answer = await checks.collect(engine.generate(checks.request(case, max_tokens=4)))
                assert checks.ids_of(answer) == reference.text(case, 4)
                await engine.drop(f"s{seed}")
                if seed == 6:  # ids nearly used up: the next soft prompt clears the cache first
                    worn = (1 << 30) // engine.slots.rows.capacity
                    engine.slots.rows.uses = [u + worn for u in engine.slots.rows.uses]
                    engine.slots.rows.most_uses += worn
            assert max(engine.slots.rows.uses[row] for row in engine.slots.rows.free) < 20
        finally:
            await engine.close()

    asyncio.run(go())


def test_the_model_is_left_as_it_was(folders: Callable[[str], Path]) -> None:
    backbone = load_backbone(ModelConfig(str(folders("llama-gqa"))))
    ids = torch.tensor([[5, 6, 7, 8]])
    before = backbone.model(ids).logits
    attention = backbone.model.config._attn_implementation

    async def go() -> None:
        engine = TransformersEngine(config(folders("llama-gqa")), backbone)
        await engine.start()
        await checks.load(engine, checks.prompts_of(backbone, SIZES))
        await engine.close()
        await engine.close()

    asyncio.run(go())
    assert torch.equal(backbone.model(ids).logits, before)
    assert backbone.model.config._attn_implementation == attention
