"""Against the installed PEFT: files byte for byte, logits, initial rows, loss, and a whole training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import tiny
from foreword.artifact.folder import (
    CONFIG,
    LEGACY_WEIGHTS,
    TENSOR,
    WEIGHTS,
    Adapter,
    read_adapter,
    write_adapter,
)
from foreword.artifact.peft_types import PEFT_VERSION, peft_config
from foreword.artifact.sidecar import Sidecar
from foreword.backbone.choose import choose_layout
from foreword.backbone.load import Backbone
from foreword.backbone.virtual import VirtualTokens
from foreword.config import Member, PromptConfig, TrainConfig
from foreword.jobs.prepare import first_method, make_encoder
from foreword.prompts.soft import SoftPrompt
from foreword.records import Example, Task
from foreword.training.loop import Event, Hooks, train
from foreword.training.prepare import prepared
from foreword.training.state import epoch_order, make_plan, start

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # transformers', at PEFT's save_pretrained
)
FAMILIES = ["llama-gqa", "gpt2", "bloom", "gemma3"]
IDS = torch.tensor([[5, 6, 7, 90, 30, 12, 200]])
INIT_TEXT = "Classify if the tweet is a complaint or no complaint:"
SIDE = Sidecar(Task("{text}", " ", "label"), {"name": "tiny"})


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; each test loads its own copy, for PEFT alters what it wraps."""
    return tiny.save(tmp_path_factory.mktemp("base") / str(request.param), request.param)


@cache
def _loaded(base: Path) -> Backbone:
    return Backbone(model_of(base), tiny.tokenizer(), str(base))


def model_of(base: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def our_logits(base: Path, rows: torch.Tensor) -> Any:
    backbone = _loaded(base)
    with torch.no_grad(), VirtualTokens(backbone.embedding, rows) as virtual:
        return backbone.model(input_ids=torch.cat([torch.tensor([virtual.ids]), IDS], dim=1)).logits


def peft_logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def our_folder(folder: Path, base: Path, init_text: str | None = None, sidecar: Sidecar | None = SIDE) -> Adapter:
    backbone = _loaded(base)
    rows = torch.randn(5, backbone.hidden_size, generator=torch.Generator().manual_seed(3))
    tensors = {TENSOR: rows}
    write_adapter(folder, tensors, config_of(tensors, base, init_text), sidecar)
    return read_adapter(folder)


def config_of(tensors: dict[str, torch.Tensor], base: Path, init_text: str | None) -> dict[str, Any]:
    return peft_config(
        "PROMPT_TUNING", tensors, model_config=_loaded(base).config, base=str(base), revision=None,
        prompt=PromptConfig(), init_text=init_text,
    )  # fmt: skip


def peft_model(base: Path, init: str = "TEXT", tokens: int = 5) -> Any:
    text: dict[str, Any] = (
        {"prompt_tuning_init_text": INIT_TEXT, "tokenizer_name_or_path": str(base)} if init == "TEXT" else {}
    )
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", prompt_tuning_init=init, num_virtual_tokens=tokens, revision=None, **text
    )
    torch.manual_seed(4)
    return peft.get_peft_model(model_of(base), config)


def peft_rows(model: Any) -> Any:
    return model.prompt_encoder["default"].embedding.weight.detach().clone()


# --- one folder, two readers ------------------------------------------------------------------


def test_the_installed_peft_is_the_version_our_files_name() -> None:
    assert peft.__version__ == PEFT_VERSION


@pytest.mark.parametrize("sidecar", [SIDE, None], ids=["with sidecar", "bare"])
def test_peft_reads_our_folder_and_computes_our_logits(base: Path, tmp_path: Path, sidecar: Sidecar | None) -> None:
    ours = our_folder(tmp_path, base, sidecar=sidecar)
    theirs = peft.PeftModel.from_pretrained(model_of(base), tmp_path)
    assert torch.equal(peft_rows(theirs), ours.prompt.values)
    torch.testing.assert_close(our_logits(base, ours.prompt.values), peft_logits(theirs), atol=1e-5, rtol=0)


def test_other_rows_give_other_logits(base: Path, tmp_path: Path) -> None:
    """Else the equalities of logits would say nothing."""
    rows = our_folder(tmp_path, base).prompt.values
    difference = our_logits(base, rows) - our_logits(base, rows.flip(0))
    assert difference[:, len(rows) :].abs().max() > 1e-2


@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB", "RANDOM"])
def test_we_read_pefts_folder_and_compute_its_logits(base: Path, tmp_path: Path, init: str) -> None:
    theirs = peft_model(base, init)
    theirs.save_pretrained(tmp_path)
    found = read_adapter(tmp_path)
    assert found.sidecar is None
    assert found.config["prompt_tuning_init"] == init
    assert torch.equal(found.prompt.values, peft_rows(theirs))
    torch.testing.assert_close(our_logits(base, found.prompt.values), peft_logits(theirs), atol=1e-5, rtol=0)


def test_we_read_the_bin_file_of_older_pefts(base: Path, tmp_path: Path) -> None:
    theirs = peft_model(base)
    theirs.save_pretrained(tmp_path)
    torch.save(peft.get_peft_model_state_dict(theirs), tmp_path / LEGACY_WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    assert torch.equal(read_adapter(tmp_path).prompt.values, peft_rows(theirs))


def test_a_named_peft_adapter_is_found_in_its_subfolder(base: Path, tmp_path: Path) -> None:
    theirs = peft_model(base)
    theirs.add_adapter("tweets", theirs.peft_config["default"])
    theirs.save_pretrained(tmp_path, selected_adapters=["tweets"])
    assert read_adapter(tmp_path / "tweets").prompt.values.shape == (5, tiny.HIDDEN)


# --- byte for byte ----------------------------------------------------------------------------


@pytest.mark.parametrize("init_text", [None, "größer oder kleiner?"], ids=["random", "text"])
def test_peft_saves_our_folder_again_byte_for_byte(base: Path, tmp_path: Path, init_text: str | None) -> None:
    our_folder(tmp_path / "ours", base, init_text)
    peft.PeftModel.from_pretrained(model_of(base), tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "theirs" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB", "RANDOM"])
def test_we_save_pefts_folder_again_byte_for_byte(base: Path, tmp_path: Path, init: str) -> None:
    peft_model(base, init).save_pretrained(tmp_path / "theirs")
    found = read_adapter(tmp_path / "theirs")
    write_adapter(tmp_path / "ours", found.tensors, found.config, found.sidecar)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_our_configuration_is_the_one_peft_writes(base: Path, tmp_path: Path) -> None:
    theirs = peft_model(base)
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = {TENSOR: peft_rows(theirs)}
    write_adapter(tmp_path / "ours", tensors, config_of(tensors, base, INIT_TEXT), None)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


# --- initial rows and loss --------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [3, 40], ids=["cut", "tiled"])
def test_text_initialisation_equals_pefts(base: Path, tokens: int) -> None:
    backbone, task = _loaded(base), Task("{text}", " ", "label")
    choice = PromptConfig(virtual_tokens=tokens, init="text", init_text=INIT_TEXT)
    encoder = make_encoder(task, backbone, tokens)
    ours = first_method(choice, task, encoder, backbone, Member("text", 0, 0.03), None)
    assert torch.equal(ours(), peft_rows(peft_model(base, tokens=tokens)))


CONTEXTS = 6
TARGETS = [(10, 11, 0), (12, 13, 0)]


def equal_rows(count: int) -> list[Example]:
    """Rows of one length, so that a batch of them needs no padding; as the guide's, but unpadded."""
    draw = torch.Generator().manual_seed(5)
    contexts = torch.randint(20, tiny.VOCAB, (count, CONTEXTS), generator=draw).tolist()
    return [Example(i + 1, (7, 8, *c), TARGETS[i % 2]) for i, c in enumerate(contexts)]


def guide_batch(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """The guide's tensors: -100 over the context, the target with its end token learnt."""
    ids = torch.tensor([[*e.context, *e.target] for e in examples])
    labels = torch.tensor([[-100] * len(e.context) + [*e.target] for e in examples])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def curve_of_ours(base: Path, rows: torch.Tensor, examples: Sequence[Example], config: TrainConfig) -> list[Event]:
    backbone = _loaded(base)
    segments = tiny.in_front(examples, len(rows))
    layout = choose_layout(backbone, SoftPrompt(rows), segments).train
    events: list[Event] = []
    member = Member("text", 0, 0.03)
    population = start([tiny.soft(rows)], [member], config, make_plan(len(examples), config), backbone.device)
    with prepared(backbone, segments, population, config, layout) as ready:
        train(ready.engine, ready.segments, population, config, Hooks(on_event=events.append))
    return events


def test_the_loss_of_an_unpadded_row_equals_pefts(base: Path) -> None:
    theirs, examples = peft_model(base), equal_rows(1)
    with torch.no_grad():
        expected = theirs(**guide_batch(examples)).loss
    found = curve_of_ours(base, peft_rows(theirs), examples, TrainConfig(epochs=1))[0]["loss"]
    assert found == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("warmup", [0, 4])
def test_our_training_follows_pefts_guide_loop(base: Path, warmup: int) -> None:
    config = TrainConfig(lr=3e-2, epochs=5, batch_size=3, warmup_steps=warmup, seed=9)
    examples = equal_rows(12)
    theirs = peft_model(base)
    ours = curve_of_ours(base, peft_rows(theirs), examples, config)
    losses = guide_loop(theirs, examples, config)
    assert len(ours) == len(losses) == 20
    assert [e["loss"] for e in ours] == pytest.approx(losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.1, "it learns: the curves are not equal by standing still"


def guide_loop(model: Any, examples: Sequence[Example], config: TrainConfig) -> list[float]:
    """The loop of PEFT's guide, reading the rows in the order of ours.

    Without the guide's ``model.train()``, which turns dropout on in the frozen model too (GPT-2 has some).
    """
    steps = config.epochs * len(examples) // config.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, config.warmup_steps, steps)
    model.eval()
    losses = []
    for epoch in range(config.epochs):
        order = epoch_order(len(examples), 0, epoch)
        for at in range(0, len(order), config.batch_size):
            loss = model(**guide_batch([examples[i] for i in order[at : at + config.batch_size]])).loss
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses


def test_the_tensor_has_pefts_name(base: Path) -> None:
    assert list(peft.get_peft_model_state_dict(peft_model(base))) == [TENSOR]
