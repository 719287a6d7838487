"""Backbones larger than a card: layers spread over cards, RAM and disk by accelerate.

Weights that do not fit lie elsewhere and are fetched for each pass. Such a parameter is on the meta device between
passes, which is how it is known here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foreword.errors import ForewordError

OFFLOAD = str(Path(tempfile.gettempdir()) / "foreword-offload")


def spreading(device_map: str, max_memory: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that spread the layers.

    Args:
        device_map: of the configuration.
        max_memory: of the configuration.
    """
    if device_map != "auto":
        raise ForewordError(f"model.device_map is '{device_map}'", "key model.device_map", "auto, or leave it out")
    limits = {int(k) if str(k).isdecimal() else k: v for k, v in max_memory.items()}
    # What lies on disk is fetched from the checkpoint's own safetensors; the folder would be for other formats.
    return {"device_map": device_map, "offload_folder": OFFLOAD, **({"max_memory": limits} if limits else {})}


def offloaded(model: nn.Module) -> bool:
    """Whether some weights are elsewhere between passes."""
    return any(p.device.type == "meta" for p in model.parameters())


def computes_on(module: nn.Module) -> torch.device:
    """Where a module runs, which is not where its weights lie when they are elsewhere."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if weight.device.type != "meta":
        return weight.device
    hook: Any = module._hf_hook
    return torch.device(hook.execution_device)


def fetched(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter of a module, from where it lies."""
    found: torch.Tensor = getattr(module, name)
    if found.device.type != "meta":
        return found
    hook: Any = module._hf_hook
    stored: torch.Tensor = hook.weights_map[name]
    return stored
