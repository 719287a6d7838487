"""Every soft-prompt type against the installed PEFT, on four families: files byte for byte, and logits.

What PEFT 0.21.2 itself refuses or does differently is asserted here by name.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save

import tiny
from foreword.artifact.folder import CONFIG, LEGACY_WEIGHTS, WEIGHTS, Adapter, read_adapter, write_adapter
from foreword.artifact.peft_types import PLACED, TASK_COLS, TASK_ROWS, TENSOR, TYPES, peft_config, placed_config
from foreword.backbone.kv import Geometry, cache_of
from foreword.config import PromptConfig
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # transformers', at PEFT's save_pretrained
)
FAMILIES = ["llama-gqa", "gpt2", "bloom", "gemma3"]
TOKENS, TASKS, RANK = 5, 3, 2
IDS = torch.randint(1, tiny.VOCAB, (1, 2 * tiny.WINDOW), generator=torch.Generator().manual_seed(1))  # past a window
TEXT = "Classify if the tweet is a complaint: größer?"
CPT_IDS, CPT_TYPES = [7, 3, 90, 3, 12], [1, 2, 2, 3, 4]


@dataclass(frozen=True)
class Case:
    """A PEFT configuration and our settings that mean the same."""

    peft_type: str
    theirs: Callable[[str], Any]
    prompt: PromptConfig = field(default_factory=PromptConfig)
    ours: dict[str, Any] = field(default_factory=dict)
    error: float = 1e-10
    """Between PEFT's logits before it saved and ours after; the model computes in float64."""


def _made(kind: Any, **keys: Any) -> Callable[[str], Any]:
    return lambda base: kind(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **keys)


def _from_text(kind: Any, **keys: Any) -> Callable[[str], Any]:
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TEXT}
    return lambda base: _made(kind, tokenizer_name_or_path=base, **text, **keys)(base)


def _cpt(base: str) -> Any:
    return peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=CPT_IDS, cpt_tokens_type_mask=CPT_TYPES, tokenizer_name_or_path=base,
        opt_weighted_loss_type="decay", opt_loss_decay_factor=0.95, opt_projection_epsilon=0.2,
    )  # fmt: skip


FACTORS = {"num_tasks": TASKS, "num_ranks": RANK}
CASES = {
    "prompt": Case("PROMPT_TUNING", _made(peft.PromptTuningConfig)),
    "prompt-text": Case("PROMPT_TUNING", _from_text(peft.PromptTuningConfig), ours={"init_text": TEXT}),
    "p": Case("P_TUNING", _made(peft.PromptEncoderConfig)),
    "p-lstm": Case(
        "P_TUNING",
        _made(peft.PromptEncoderConfig, encoder_hidden_size=20, encoder_reparameterization_type="LSTM"),
        PromptConfig(encoder="lstm", encoder_size=20),
        # PEFT saves the float32 LSTM's output with gradients on, which is another kernel than the one it runs:
        error=1e-5,  # what it saved and what it computed differ by 1e-6
    ),
    "prefix": Case("PREFIX_TUNING", _made(peft.PrefixTuningConfig)),
    "prefix-projected": Case(
        "PREFIX_TUNING",
        _made(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=512),
        PromptConfig(projection=True),
    ),
    "multitask": Case("MULTITASK_PROMPT_TUNING", _made(peft.MultitaskPromptTuningConfig, **FACTORS)),
    "multitask-text": Case(
        "MULTITASK_PROMPT_TUNING", _from_text(peft.MultitaskPromptTuningConfig, **FACTORS), ours={"init_text": TEXT}
    ),
    "cpt": Case("CPT", _cpt, PromptConfig(epsilon=0.2), {"token_ids": CPT_IDS, "token_types": CPT_TYPES}),
    "cartridge": Case("CARTRIDGE", _made(peft.CartridgeConfig, num_frozen_tokens=2), PromptConfig(frozen_tokens=2)),
}
PLAIN = {case.peft_type: name for name, case in reversed(CASES.items())}
"""The simplest case of each type."""


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; each test loads its own copy, for PEFT alters what it wraps."""
    return tiny.save(tmp_path_factory.mktemp("base") / str(request.param), request.param)


def model_of(base: Path) -> Any:
    """In float64, so that only what is computed differs, not the order of sums; PEFT's prompts stay float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    return model.requires_grad_(False).eval()


def geometry_of(config: Any) -> Geometry:
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Geometry(config.num_hidden_layers, heads, head_dim)


def peft_model(base: Path, case: Case) -> Any:
    """PEFT's adapter, all its parameters drawn anew, as after a training."""
    torch.manual_seed(4)
    model = peft.get_peft_model(model_of(base), case.theirs(str(base)))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.normal_(0.0, 0.5, generator=draw)
    return model.eval()


def peft_logits(model: Any, case: Case, task: int = 0) -> torch.Tensor:
    tasks = {"task_ids": torch.tensor([task])} if case.peft_type == "MULTITASK_PROMPT_TUNING" else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **tasks).logits
    return found[:, -IDS.shape[1] :]


@torch.no_grad()
def our_logits(base: Path, prompt: SoftPrompt) -> torch.Tensor:
    """Of the text's tokens ``[1, T, V]``, by nothing but the model itself and the prompt's values."""
    model = model_of(base)
    values, embedded = prompt.values.double()[None], model.get_input_embeddings()(IDS)
    if prompt.kind == "rows":
        found: torch.Tensor = model(inputs_embeds=torch.cat([values, embedded], dim=1)).logits
        return found[:, prompt.tokens :]
    positions = {"position_ids": torch.arange(IDS.shape[1])[None] + prompt.tokens}
    takes = inspect.signature(model.forward).parameters
    cache = cache_of(geometry_of(model.config).layered(values))
    found = model(input_ids=IDS, past_key_values=cache, **{k: v for k, v in positions.items() if k in takes})
    return cast(torch.Tensor, found.logits)


def our_tensors(case: Case, config: Any) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(6)
    kind = TYPES[case.peft_type]
    width = geometry_of(config).width if kind.kind == "prefix" else config.hidden_size
    shapes = {TENSOR: (TOKENS, width), TASK_COLS: (TASKS, TOKENS, RANK), TASK_ROWS: (TASKS, RANK, width)}
    return {name: torch.randn(shapes[name], generator=draw) for name in kind.shapes}


def our_folder(folder: Path, base: Path, case: Case) -> Adapter:
    config = transformers.AutoConfig.from_pretrained(base)
    tensors = our_tensors(case, config)
    write_adapter(folder, tensors, our_config(case, tensors, config, base), None)
    return read_adapter(folder)


def our_config(case: Case, tensors: dict[str, torch.Tensor], config: Any, base: Path) -> dict[str, Any]:
    return peft_config(
        case.peft_type, tensors, model_config=config, base=str(base), revision=None, prompt=case.prompt,
        geometry=geometry_of(config), **case.ours,
    )  # fmt: skip


def close(ours: torch.Tensor, theirs: torch.Tensor, error: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, atol=error, rtol=0)


def refused(folder: Path, task: int = 0) -> str:
    with pytest.raises(ForewordError) as caught:
        read_adapter(folder, task)
    assert str(folder) in caught.value.where
    return caught.value.what


# --- logits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_we_read_pefts_folder_and_compute_its_logits(base: Path, tmp_path: Path, name: str) -> None:
    theirs = peft_model(base, CASES[name])
    theirs.save_pretrained(tmp_path)
    found = read_adapter(tmp_path)
    assert (found.config["peft_type"], found.prompt.tokens, found.sidecar) == (CASES[name].peft_type, TOKENS, None)
    close(our_logits(base, found.prompt), peft_logits(theirs, CASES[name]), CASES[name].error)


@pytest.mark.parametrize("name", CASES)
def test_peft_reads_our_folder_and_computes_our_logits(base: Path, tmp_path: Path, name: str) -> None:
    ours = our_folder(tmp_path, base, CASES[name])
    theirs = peft.PeftModel.from_pretrained(model_of(base), tmp_path).eval()
    close(our_logits(base, ours.prompt), peft_logits(theirs, CASES[name]))


@pytest.mark.parametrize("name", PLAIN.values())
def test_other_values_give_other_logits(base: Path, tmp_path: Path, name: str) -> None:
    """Else the equalities of logits would say nothing."""
    prompt = our_folder(tmp_path, base, CASES[name]).prompt
    difference = our_logits(base, prompt) - our_logits(base, SoftPrompt(prompt.values.flip(1), prompt.kind))
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("task", range(TASKS))
def test_each_task_of_a_multitask_adapter_is_read(base: Path, tmp_path: Path, task: int) -> None:
    case = CASES["multitask"]
    our_folder(tmp_path, base, case)
    theirs = peft.PeftModel.from_pretrained(model_of(base), tmp_path).eval()
    close(our_logits(base, read_adapter(tmp_path, task).prompt), peft_logits(theirs, case, task))
    with pytest.raises(ValueError, match="task_ids cannot be None"):  # PEFT has no default task; ours is 0
        theirs(input_ids=IDS)


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_our_files_are_the_ones_peft_writes(base: Path, tmp_path: Path, name: str) -> None:
    theirs = peft_model(base, CASES[name])
    theirs.save_pretrained(tmp_path / "theirs")
    found = read_adapter(tmp_path / "theirs")
    made = our_config(CASES[name], dict(found.tensors), theirs.base_model.config, base)
    write_adapter(tmp_path / "made", found.tensors, made, None)
    write_adapter(tmp_path / "again", found.tensors, found.config, None)
    for file in (CONFIG, WEIGHTS):
        expected = (tmp_path / "theirs" / file).read_bytes()
        assert (tmp_path / "made" / file).read_bytes() == expected
        assert (tmp_path / "again" / file).read_bytes() == expected


@pytest.mark.parametrize("name", CASES)
def test_peft_saves_our_folder_again_byte_for_byte(base: Path, tmp_path: Path, name: str) -> None:
    our_folder(tmp_path / "ours", base, CASES[name])
    peft.PeftModel.from_pretrained(model_of(base), tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.parametrize("name", PLAIN.values())
def test_we_read_the_bin_file_of_older_pefts(base: Path, tmp_path: Path, name: str) -> None:
    theirs = peft_model(base, CASES[name])
    for folder, safe in ((tmp_path / "old", False), (tmp_path / "new", True)):
        theirs.save_pretrained(folder, safe_serialization=safe)
    assert (tmp_path / "old" / LEGACY_WEIGHTS).exists() and not (tmp_path / "old" / WEIGHTS).exists()
    old, new = read_adapter(tmp_path / "old"), read_adapter(tmp_path / "new")
    assert old.tensors.keys() == new.tensors.keys() == TYPES[CASES[name].peft_type].shapes.keys()
    assert all(torch.equal(old.tensors[n], new.tensors[n]) for n in new.tensors)
    assert torch.equal(old.prompt.values, new.prompt.values)
    assert not any(t.requires_grad for t in old.tensors.values())
    write_adapter(tmp_path / "again", old.tensors, old.config, None)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "new" / WEIGHTS).read_bytes()


def test_stored_types_are_kept_and_the_prompt_is_float32(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("CPT")
    stored = {TENSOR: read_adapter(folder).prompt.values.bfloat16()}
    (folder / WEIGHTS).write_bytes(save(stored))
    found = read_adapter(folder)
    assert torch.equal(found.tensors[TENSOR], stored[TENSOR])
    assert (found.tensors[TENSOR].dtype, found.prompt.values.dtype) == (torch.bfloat16, torch.float32)


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    whole = torch.randn(4, 3)
    write_adapter(tmp_path, {"a": whole, "b": whole[1:].T}, {}, None)
    write_adapter(tmp_path, {"a": whole, "b": whole[:2]}, {}, None)
    assert torch.equal(load_file(tmp_path / WEIGHTS)["b"], whole[:2])


# --- placed elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("peft_type", ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"])
def test_peft_refuses_a_prompt_that_does_not_stand_at_the_front(
    tiny_folder: Callable[..., Path], peft_type: str
) -> None:
    """A key it does not know it would drop with a warning, and put the virtual tokens at the front."""
    before = read_adapter(tiny_folder(peft_type), 0)
    write_adapter(before.folder, before.tensors, placed_config(before.config), None)
    found = read_adapter(before.folder)
    assert found.config == {**before.config, "peft_type": PLACED}
    assert found.tensors.keys() == before.tensors.keys()
    assert torch.equal(found.prompt.values, before.prompt.values)
    with pytest.raises(KeyError, match=PLACED):
        peft.PeftConfig.from_pretrained(before.folder)
    with pytest.raises(KeyError, match=PLACED):
        peft.PeftModel.from_pretrained(tiny.backbone().model, before.folder)


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
def test_a_prefix_has_no_other_place(peft_type: str) -> None:
    with pytest.raises(ForewordError, match="no other place"):
        placed_config({"peft_type": peft_type})


# --- what is refused --------------------------------------------------------------------------


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of a type for the tiny Llama, with some of its configuration or tensors altered."""

    def make(peft_type: str, config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> Path:
        case, model = CASES[PLAIN[peft_type]], tiny.config("llama-gqa")
        made = our_tensors(case, model)
        written = {**our_config(case, made, model, Path("user/base")), **(config or {})}
        write_adapter(tmp_path / "made", {**made, **tensors}, written, None)
        return tmp_path / "made"

    return make


W = tiny.HIDDEN * 2  # of the tiny Llama: two layers, keys and values, half as many heads
MULTITASK = "MULTITASK_PROMPT_TUNING"
OPEN = {"num_ranks": None, "num_tasks": None}
WIDE = {TASK_ROWS: torch.ones(TASKS, RANK + 1, tiny.HIDDEN)}
NAN, HUGE = (torch.full((TASKS, TOKENS, RANK), value) for value in (float("nan"), 3e38))
NINES = torch.full((TOKENS, tiny.HIDDEN), 9.0)
DAMAGE: dict[str, tuple[str, dict[str, Any], dict[str, torch.Tensor], str]] = {
    "prefix of another width": ("PREFIX_TUNING", {}, {TENSOR: torch.ones(TOKENS, W + 4)}, f"says [5, {W}]"),
    "prefix of more layers": ("PREFIX_TUNING", {"num_layers": 3}, {}, f"[5, {W}], its configuration says [5, 96]"),
    "cartridge of wider heads": ("CARTRIDGE", {"token_dim": 17}, {}, "its configuration says [5, 68]"),
    "layers in words": ("CARTRIDGE", {"num_layers": "two"}, {}, "its configuration says [5, 'two']"),
    "other tasks": (MULTITASK, {"num_tasks": 4}, {}, "'prefix_task_cols' has shape [3, 5, 2]"),
    "other ranks": (MULTITASK, {"num_ranks": 3}, {}, "its configuration says [3, 5, 3]"),
    "factors that do not fit": (MULTITASK, OPEN, WIDE, "'prefix_task_rows' has shape [3, 3, 32]"),
    "a factor that is not finite": (MULTITASK, {}, {TASK_COLS: NAN}, "NaN"),
    "a product that is not finite": (MULTITASK, {}, {TASK_COLS: HUGE, TENSOR: NINES}, "infinite"),
    "fewer tokens in the context": ("CPT", {"cpt_token_ids": [1, 2]}, {}, "'cpt_token_ids' does not have one entry"),
    "token types in words": ("CPT", {"cpt_tokens_type_mask": "11111"}, {}, "'cpt_tokens_type_mask' does not"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_tensors_that_disagree_with_their_configuration_are_refused(
    tiny_folder: Callable[..., Path], kind: str
) -> None:
    peft_type, config, tensors, reason = DAMAGE[kind]
    assert reason in refused(tiny_folder(peft_type, config, **tensors))


def test_a_bare_configuration_is_enough(tiny_folder: Callable[..., Path]) -> None:
    """A reader needs no more than PEFT's own: the type."""
    for peft_type in TYPES:
        folder = tiny_folder(peft_type)
        whole = read_adapter(folder).prompt
        (folder / CONFIG).write_text(json.dumps({"peft_type": peft_type}))
        assert torch.equal(read_adapter(folder).prompt.values, whole.values)


@pytest.mark.parametrize("task", [-1, TASKS])
def test_a_task_that_is_not_there_is_refused_by_its_number(tiny_folder: Callable[..., Path], task: int) -> None:
    assert f"no task {task} in this adapter: it has 3" in refused(tiny_folder("MULTITASK_PROMPT_TUNING"), task)


@pytest.mark.parametrize("peft_type", [t for t in TYPES if t != MULTITASK])
def test_an_adapter_of_one_task_has_no_second(tiny_folder: Callable[..., Path], peft_type: str) -> None:
    assert "no task 1 in this adapter: it has task 0 alone" in refused(tiny_folder(peft_type), 1)


def test_a_multitask_adapter_without_its_factors_is_refused(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("MULTITASK_PROMPT_TUNING")
    (folder / WEIGHTS).write_bytes(save({TENSOR: torch.ones(TOKENS, tiny.HIDDEN)}))
    assert "no tensor 'prefix_task_cols', which a MULTITASK_PROMPT_TUNING adapter has" in refused(folder)


def test_modules_that_peft_trained_along_are_refused(tmp_path: Path) -> None:
    """The rows alone would be another adapter than the one that was trained."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["lm_head"])
    peft.get_peft_model(tiny.backbone(dtype=torch.float32).model, config).save_pretrained(tmp_path)
    assert "base_model.lm_head.weight" in load_file(tmp_path / WEIGHTS)
    assert "trained modules of the model beside the soft prompt: ['lm_head']" in refused(tmp_path)


@pytest.mark.parametrize("name", PLAIN.values())
def test_peft_has_no_soft_prompts_for_recurrent_models(name: str) -> None:
    """It asks every model for its attention heads; ours of the rows' types then say null."""
    model = tiny.backbone("mamba").model
    with pytest.raises(ValueError, match="Please specify `num_attention_heads`"):
        peft.get_peft_model(model, CASES[name].theirs("user/base"))
    if TYPES[CASES[name].peft_type].kind == "rows":
        made = our_tensors(CASES[name], model.config)
        common = {"model_config": model.config, "base": "user/base", "revision": None, "prompt": PromptConfig()}
        assert peft_config(CASES[name].peft_type, made, **common)["num_attention_heads"] is None
