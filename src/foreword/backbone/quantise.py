"""Backbones in 4 or 8 bits: the weights of their linear layers, rounded as they are loaded.

Embedding, LM head, norms and biases stay as they are, so virtual tokens, the head's short cut and
the fingerprint do not notice. Only the backbone is rounded: what is trained is not.

What these do while training (torchao 0.18, bitsandbytes 0.50):

- bitsandbytes keeps the rounded weight for the backward pass and makes its values anew there.
- torchao multiplies by the weight's values in full size, which autograd keeps until the backward
  pass: the memory is saved while scoring, and while training only with ``train.recompute``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from foreword.errors import ForewordError

SCORING_ONLY = ("int8-dynamic",)
"""Rounds activations and passes no gradient through the rounding; refused by ``training.gradcheck``."""


class _Kind(NamedTuple):
    package: str
    config: Callable[[torch.dtype], Any]


def quantised(name: str, dtype: torch.dtype) -> Any:
    """transformers' quantisation config for a value of ``model.quantize``; None for ``none``.

    Args:
        name: one of ``none`` and ``KINDS``.
        dtype: type of what stays unquantised, which the layers also compute in.

    Raises:
        ForewordError: the package it needs is not installed, or too old for transformers.
    """
    if name == "none":
        return None
    kind = KINDS[name]
    with quiet_import():
        if not _installed(kind.package):
            raise ForewordError(
                f"model.quantize={name} needs a package that is not installed, or a newer version of it",
                f"package {kind.package}",
                f"pip install -U {kind.package} (or 'foreword[quant]')",
            )
        return kind.config(dtype)


def made_trainable(model: Any) -> Any:
    """A loaded, frozen model whose bitsandbytes layers let gradients through in eval mode, on a CPU too.

    Nothing changes for other models.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16 the first forward pass without gradients would repack the
            # weights for a kernel that has no backward pass, and there is no way back.
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt" and module.weight.device.type == "cpu":
            # In training mode bitsandbytes' 8-bit layers leave activations alone on a CPU, which is
            # faster there too; nothing else depends on the mode of a linear layer.
            module.train()
    # Otherwise one line for each 8-bit layer of each pass: "inputs will be cast ... to float16".
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return model


def check_quantised(model: Any, name: str, where: str) -> None:
    """Refuses a model that was to be quantised on loading and was not, for whatever silent reason.

    Raises:
        ForewordError: the checkpoint is quantised already, or has no layer this can quantise.
    """
    if name == "none":
        return
    if model.hf_quantizer.pre_quantized:
        raise ForewordError("the checkpoint is already quantised, in its own way", where, "model.quantize=none")
    if all(type(p) is nn.Parameter for p in model.parameters()):
        what = f"model.quantize={name} finds no layer to quantise in a {model.config.model_type} model"
        raise ForewordError(what, where, "model.quantize=nf4, or none")


def rounding_of(model: Any, name: str) -> str:
    """How a loaded model is rounded: as ``model.quantize`` said, or as its checkpoint was (gptq, awq, ...)."""
    quantizer = getattr(model, "hf_quantizer", None)
    if name != "none" or quantizer is None:
        return name
    method = quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def parameter_count(model: nn.Module) -> int:
    """True number of parameters: bitsandbytes' 4-bit weights lie two to a byte, GPTQ's and AWQ's in buffers."""
    packed: list[Any] = [m for m in model.modules() if "qweight" in m._buffers]
    return sum(_true_size(p) for p in model.parameters()) + sum(int(m.in_features * m.out_features) for m in packed)


def _true_size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _installed(package: str) -> bool:
    """Whether the package is there in a version that transformers works with."""
    from transformers.utils import is_bitsandbytes_available, is_torchao_available

    return bool(is_torchao_available() if package == "torchao" else is_bitsandbytes_available())


@contextmanager
def quiet_import() -> Iterator[None]:
    """Inside, torchao and bitsandbytes do not tell which of their libraries this machine cannot load.

    transformers imports them with the first model or schedule of a process, wherever they are installed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _nf4(dtype: torch.dtype) -> Any:
    """QLoRA's 4 bits, scales rounded too: 4.13 bits a weight (arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _int8(dtype: torch.dtype) -> Any:
    """LLM.int8(): weights and activations in 8 bits, outlying activations in 16 (arXiv 2208.07339)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _int8_weight(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(Int8WeightOnlyConfig)


def _float8_weight(dtype: torch.dtype) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return _torchao(Float8WeightOnlyConfig)


def _int8_dynamic(dtype: torch.dtype) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(Int8DynamicActivationInt8WeightConfig)


def _torchao(config: Callable[..., Any]) -> Any:
    from transformers import TorchAoConfig

    # Without this torchao sets options of torch.compile for the whole process.
    return TorchAoConfig(config(set_inductor_config=False))


KINDS = {
    "nf4": _Kind("bitsandbytes", _nf4),
    "int8": _Kind("bitsandbytes", _int8),
    "int8-weight": _Kind("torchao", _int8_weight),
    "float8-weight": _Kind("torchao", _float8_weight),
    "int8-dynamic": _Kind("torchao", _int8_dynamic),
}
"""Values of ``model.quantize`` beside ``none``."""
