"""Backbones in 4 and 8 bits, and the check that finds a wrong gradient before anything is trained on it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import foreword
import tiny
from conftest import ROWS
from foreword.backbone import quantise
from foreword.backbone.forward import packed_logprobs, rows_logprobs
from foreword.backbone.load import Backbone, load_backbone
from foreword.backbone.quantise import KINDS, SCORING_ONLY, parameter_count, quantised
from foreword.backbone.virtual import VirtualTokens
from foreword.checks import CHOICES
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.records import Segment
from foreword.serving.engine import Capabilities
from foreword.serving.reading import read_content
from foreword.training.gradcheck import TOLERANCE, check_gradient, directional_error, gradient_error, loss_noise

TRAINABLE = [name for name in KINDS if name not in SCORING_ONLY]
VIRTUAL = 4
SEGMENTS = [Segment((20, 31, 42, 53), ((5, 7),)), Segment((61, 12), ((9,),)), Segment((33, 44, 55), ((7, 7, 8),))]
OPENING = tuple(range(tiny.VOCAB, tiny.VOCAB + VIRTUAL))

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torchao


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Altered(torch.autograd.Function):
    """The identity, with whatever gradient it is told to have."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.change(grads[0]), None


def rows_of(backbone: Backbone, seed: int = 0) -> torch.Tensor:
    """A soft prompt ``[P, H]`` made of vocabulary rows, as training starts from."""
    ids = torch.randint(0, tiny.VOCAB, (VIRTUAL,), generator=generator(seed))
    wide = torch.promote_types(backbone.dtype, torch.float32)
    rows = backbone.embedding.weight[ids].to(wide).clone()  # type: ignore[index]
    return rows.requires_grad_()


def loss_of(
    backbone: Backbone, rows: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Callable[[], torch.Tensor]:
    """The loss of a small batch, its gradient altered on the way to the rows."""

    def loss() -> torch.Tensor:
        table = Altered.apply(rows, change) if change else rows
        with VirtualTokens(backbone.embedding, table):
            return -rows_logprobs(backbone, [(OPENING, SEGMENTS)]).mean()

    return loss


# The check itself


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma3"])
def test_a_right_gradient_passes_and_nothing_is_changed(family: str, dtype: torch.dtype) -> None:
    backbone = tiny.backbone(family, dtype)
    rows = rows_of(backbone)
    before = rows.detach().clone()
    error = check_gradient(loss_of(backbone, rows), [rows], "tiny", generator())
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
    assert torch.equal(rows, before)
    assert rows.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 1e-6, 0.4, 2.5, -1.0])
def test_a_gradient_of_another_size_is_refused(factor: float, dtype: torch.dtype) -> None:
    backbone = tiny.backbone("llama-gqa", dtype)
    rows = rows_of(backbone)
    before = rows.detach().clone()
    with pytest.raises(ForewordError, match="gradient through the backbone is wrong") as caught:
        check_gradient(loss_of(backbone, rows, lambda g: g * factor), [rows], "tiny-llama", generator())
    assert caught.value.where == "tiny-llama"
    assert "model.quantize=nf4" in caught.value.fix
    assert torch.equal(rows, before)


def test_a_gradient_that_leaves_parameters_out_is_mostly_refused() -> None:
    """Along itself such a gradient is right: only the random direction sees it, and may point elsewhere."""
    backbone = tiny.backbone("llama-gqa", torch.float32)
    rows = rows_of(backbone)
    half = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None]
    loss = loss_of(backbone, rows, lambda g: g * half)
    assert sum(gradient_error(loss, [rows], generator(seed)) > TOLERANCE for seed in range(5)) >= 3


def test_a_gradient_cut_off_altogether_is_refused() -> None:
    backbone = tiny.backbone("llama-gqa", torch.float32)
    rows = rows_of(backbone)
    loss = loss_of(backbone, rows)
    assert gradient_error(lambda: loss().detach(), [rows], generator()) == 1.0


def test_a_gradient_where_the_loss_stands_still_is_refused() -> None:
    rows = torch.ones(3, 4, requires_grad=True)
    assert gradient_error(lambda: 2.0 + (rows - rows.detach()).sum(), [rows], generator()) > TOLERANCE


def test_a_loss_that_does_not_depend_on_the_parameters_has_no_gradient() -> None:
    rows = torch.ones(3, 4, requires_grad=True)
    assert gradient_error(lambda: (rows * 0).sum() + 1, [rows], generator()) == 0.0


def test_a_loss_that_is_no_number_is_told_apart_from_a_wrong_gradient() -> None:
    rows = torch.ones(3, 4, requires_grad=True)

    def near_only() -> torch.Tensor:
        return 1 + rows.sum() / 1000 if (rows - 1).norm() < 0.1 else rows.sum() * math.nan

    for loss in (lambda: (rows * math.nan).sum(), near_only):
        with pytest.raises(ForewordError, match="not a finite number"):
            check_gradient(loss, [rows], "tiny", generator())


def test_several_parameters_are_checked_together_and_put_back_when_the_loss_fails() -> None:
    wide, flat = torch.randn(2, 3, 4, generator=generator(1), dtype=torch.float64).unbind(0)
    parameters = [wide.requires_grad_(), flat[0].clone().requires_grad_()]
    before = [p.detach().clone() for p in parameters]

    def loss() -> torch.Tensor:
        return (parameters[0] @ parameters[1]).tanh().square().sum() + 1

    assert gradient_error(loss, parameters, generator()) < 1e-3
    calls = iter([loss, loss, lambda: 1 / 0])
    with pytest.raises(ZeroDivisionError):
        gradient_error(lambda: next(calls)(), parameters, generator())
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_a_long_step_is_as_good_as_a_short_one() -> None:
    """Three nodes are exact for slopes of degree five, so for a loss of degree six."""
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    direction = [torch.tensor([0.6, 0.8], dtype=torch.float64)]
    for step in (1e-3, 0.1, 10.0):
        assert directional_error(lambda: (x**6).sum(), [x], direction, step) < 1e-9
    assert directional_error(lambda: (x.detach() ** 6).sum(), [x], direction, 0.1) == 1.0


def test_noise_is_what_the_gradient_does_not_explain() -> None:
    x = torch.linspace(-1, 1, 50, dtype=torch.float64).requires_grad_()
    draws = [loss_noise(lambda: (x * 3).sum() + 5, [x], generator(i)) for i in range(2)]
    assert max(draws) < 1e-12
    stairs = loss_noise(lambda: ((x * 3).sum() * 1000).round() / 1000, [x], generator())
    assert 0.001 < stairs < 0.02


# Loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRAINABLE)
def test_a_quantised_backbone_is_the_same_backbone_and_can_be_trained_on(
    model_folder: Path, name: str, dtype: str
) -> None:
    plain = load_backbone(ModelConfig(str(model_folder), dtype=dtype, device="cpu"))
    backbone = load_backbone(ModelConfig(str(model_folder), dtype=dtype, device="cpu", quantize=name))
    assert backbone.quantised
    assert not plain.quantised
    assert backbone.parameters == plain.parameters
    assert (backbone.dtype, backbone.device) == (plain.dtype, plain.device)
    assert plain.fingerprint.differs(backbone.fingerprint) == ""
    assert backbone.knows_head
    assert not any(p.requires_grad for p in backbone.model.parameters())
    for kept in (backbone.embedding, backbone.model.get_output_embeddings()):
        assert type(kept.weight) is nn.Parameter
    rows = rows_of(plain)
    with torch.no_grad():
        exact, rounded = loss_of(plain, rows)(), loss_of(backbone, rows)()
    assert exact != rounded
    assert abs(exact - rounded) < 0.25 * exact
    assert check_gradient(loss_of(backbone, rows), [rows], name, generator()) < 0.1


@pytest.mark.parametrize("seed", range(8))
def test_rounded_activations_with_a_right_gradient_pass(model_folder: Path, seed: int) -> None:
    """LLM.int8() as a GPU runs it, which is what its layers do on a CPU in eval mode: a loss full of small steps."""
    backbone = load_backbone(ModelConfig(str(model_folder), dtype="bfloat16", device="cpu", quantize="int8"))
    backbone.model.eval()
    rows = rows_of(backbone, seed)
    loss = loss_of(backbone, rows)
    assert loss_noise(loss, [rows], generator(seed)) > 1e-4
    check_gradient(loss, [rows], "int8", generator(seed))


@pytest.mark.parametrize("name", TRAINABLE)
def test_packed_rows_of_a_quantised_backbone_are_what_single_rows_are(model_folder: Path, name: str) -> None:
    backbone = load_backbone(ModelConfig(str(model_folder), dtype="float32", device="cpu", quantize=name))
    rows = rows_of(backbone)
    with torch.no_grad(), VirtualTokens(backbone.embedding, rows):
        packed = packed_logprobs(backbone, [(OPENING, SEGMENTS)])
        single = rows_logprobs(backbone, [(OPENING, SEGMENTS)])
    assert torch.allclose(packed, single, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCORING_ONLY)
def test_dynamically_rounded_activations_score_but_are_not_trained_through(
    model_folder: Path, name: str, dtype: str
) -> None:
    backbone = load_backbone(ModelConfig(str(model_folder), dtype=dtype, device="cpu", quantize=name))
    rows = rows_of(backbone)
    with torch.no_grad():
        assert loss_of(backbone, rows)().isfinite()
    with pytest.raises(ForewordError, match="says nothing about how the loss changes"):
        check_gradient(loss_of(backbone, rows), [rows], name, generator())


def test_four_bits_work_where_layers_are_conv1d_and_torchao_says_it_finds_none(tmp_path: Path) -> None:
    folder = str(tiny.save(tmp_path / "gpt2", "gpt2"))
    backbone = load_backbone(ModelConfig(folder, device="cpu", quantize="nf4"))
    assert backbone.parameters == tiny.backbone("gpt2").parameters
    rows = rows_of(backbone)
    assert check_gradient(loss_of(backbone, rows), [rows], "gpt2", generator()) < 0.1
    with pytest.raises(ForewordError, match="finds no layer to quantise in a gpt2 model"):
        load_backbone(ModelConfig(folder, device="cpu", quantize="int8-weight"))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config` or equivalent parameters:UserWarning")
def test_a_checkpoint_that_is_quantised_already_is_not_quantised_again(model_folder: Path, tmp_path: Path) -> None:
    made = load_backbone(ModelConfig(str(model_folder), device="cpu", quantize="nf4"))
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    again = load_backbone(ModelConfig(str(tmp_path), device="cpu"))
    assert again.quantised
    assert again.parameters == made.parameters
    rows = rows_of(again)
    assert check_gradient(loss_of(again, rows), [rows], "nf4", generator()) < 0.1
    with pytest.raises(ForewordError, match="already quantised"):
        load_backbone(ModelConfig(str(tmp_path), device="cpu", quantize="int8"))


def test_scoring_does_not_repack_weights_for_a_kernel_without_gradients(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    backbone = load_backbone(ModelConfig(str(model_folder), device="cpu", quantize="nf4"))
    layers = [m for m in backbone.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert layers
    assert not any(m.support_avx512bf16_for_cpu for m in layers)
    rows = rows_of(backbone)
    with torch.no_grad():
        scored = loss_of(backbone, rows)()
    assert loss_of(backbone, rows)().item() == pytest.approx(scored.item(), abs=1e-5)
    assert check_gradient(loss_of(backbone, rows), [rows], "nf4", generator()) < 0.1


def test_loading_in_8_bits_does_not_warn_of_a_cast_in_every_layer(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = load_backbone(ModelConfig(str(model_folder), device="cpu", quantize="int8"))
    backbone.model.eval()
    with torch.no_grad():
        loss_of(backbone, rows_of(backbone))()
    assert "cast" not in caplog.text


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantise, "_installed", lambda package: False)
    with pytest.raises(ForewordError) as caught:
        quantised(name, torch.float32)
    assert f"pip install -U {KINDS[name].package}" in caught.value.fix


def test_the_choices_are_the_kinds() -> None:
    assert CHOICES["model.quantize"] == ("none", *KINDS)
    assert quantised("none", torch.float32) is None


# What a soft prompt remembers of it


def trained_in(model: Path, out: Path, quantize: str) -> foreword.Foreword:
    rows = [{"text": text, "label": label} for text, label in ROWS]
    return foreword.train(
        model={"id": str(model), "quantize": quantize}, data=rows, text="text", label="label", out=out, quiet=True,
        train={"epochs": 1},
    )  # fmt: skip


def test_a_run_remembers_how_its_backbone_was_rounded_and_warns_of_another_way(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained_in(model_folder, tmp_path / "run", "nf4")
    assert json.loads((tmp_path / "run" / "foreword.json").read_text())["training"]["quantize"] == "nf4"
    with caplog.at_level("WARNING", logger="foreword"):
        assert foreword.load(tmp_path / "run").backbone.rounding == "nf4"
        assert not caplog.messages
        foreword.load(tmp_path / "run", quantize="none")
    assert caplog.messages == [
        "run was trained on weights in nf4 and is read by weights as they are: its scores may differ"
    ]


def test_an_engine_warns_of_another_way_too(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = trained_in(model_folder, tmp_path / "run", "none")
    known = capabilities_of(prompt.backbone)
    with caplog.at_level("WARNING", logger="foreword"):
        read_content(tmp_path / "run", None, known, 1 << 20)
        assert not caplog.messages
        read_content(tmp_path / "run", None, replace(known, quantize="nf4"), 1 << 20)
    assert len(caplog.messages) == 1
    assert "is read by weights in nf4" in caplog.messages[0]


def capabilities_of(backbone: Backbone) -> Capabilities:
    return Capabilities(
        "test", backbone.name, backbone.vocab_size, backbone.hidden_size, backbone.window, backbone.end_id, "float32",
        fingerprint=backbone.fingerprint.as_dict(), quantize=backbone.rounding,
    )  # fmt: skip


def test_a_checkpoint_that_is_rounded_says_so_itself(model_folder: Path, tmp_path: Path) -> None:
    """As GPTQ's and AWQ's are: their own packages load them, and nothing is rounded again."""
    rounded = load_backbone(ModelConfig(str(model_folder), quantize="int8"))
    rounded.model.save_pretrained(tmp_path / "rounded")
    rounded.tokenizer.save_pretrained(tmp_path / "rounded")
    assert load_backbone(ModelConfig(str(tmp_path / "rounded"))).rounding == "bitsandbytes"
    trained_in(tmp_path / "rounded", tmp_path / "run", "none")
    assert foreword.load(tmp_path / "run").backbone.rounding == "bitsandbytes"


class Gptq(nn.Module):
    """What a GPTQ layer has: eight weights to an integer, in a buffer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(in_features // 8, out_features, dtype=torch.int32))


def test_weights_that_lie_in_buffers_are_counted() -> None:
    assert parameter_count(nn.Sequential(nn.Linear(3, 5), Gptq(16, 32))) == 3 * 5 + 5 + 16 * 32


def test_a_checkpoint_whose_package_is_not_there_names_it(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gptq"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ForewordError, match=r"requires (optimum|gptqmodel)") as error:
        load_backbone(ModelConfig(str(folder)))
    assert error.value.fix == "install the package that it asks for"
