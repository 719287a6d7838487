"""The adapter folder: PEFT's format byte for byte, plus ``foreword.json``.

``adapter_config.json`` is sorted, indented JSON without a trailing newline; ``adapter_model.safetensors``
holds float32 tensors. What they say of each type of soft prompt: ``peft_types.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from foreword.artifact.atomic import write_atomic
from foreword.artifact.bare import load_pickle, load_safetensors, read_bare
from foreword.artifact.peft_types import TENSOR, soft_prompt, type_of
from foreword.artifact.sidecar import SIDECAR, Sidecar, read_sidecar
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt
from foreword.recipe import RECIPE

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LEGACY_WEIGHTS = "adapter_model.bin"


@dataclass(frozen=True)
class Adapter:
    """A soft prompt as it lies in a folder.

    ``prompt`` is what a model reads; ``tensors`` are those of the file that it was made from, their types
    kept; ``config`` is PEFT's configuration, unknown keys included. Of a bare file, ``folder`` is the file.
    """

    prompt: SoftPrompt
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    sidecar: Sidecar | None
    folder: Path


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], sidecar: Sidecar | None
) -> None:
    """Writes weights, configuration and sidecar, each atomically; the configuration comes last."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ForewordError(f"cannot make the folder: {e.strerror}", str(folder), "give another folder") from None
    write_atomic(folder / WEIGHTS, weights_bytes(tensors))
    if sidecar is not None:
        write_atomic(folder / SIDECAR, sidecar.to_json().encode())
    write_atomic(folder / CONFIG, json.dumps(dict(config), indent=2, sort_keys=True).encode())


def weights_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The safetensors file of these tensors, in float32."""
    whole = torch.contiguous_format
    # Cloned: tensors that share memory are refused by safetensors.
    plain = {n: t.detach().to("cpu", torch.float32).clone(memory_format=whole) for n, t in tensors.items()}
    return save(plain, metadata={"format": "pt"})


def read_adapter(folder: Path, task: int = 0) -> Adapter:
    """Reads and validates an adapter folder, ours or PEFT's, or a bare file of rows (``bare.py``).

    Args:
        folder: the folder, or the bare file.
        task: whose soft prompt to read of an adapter of several tasks.

    Raises:
        ForewordError: no adapter there, a type that is no soft prompt, a truncated or foreign file, code
            in a pickle, tensors that disagree with the configuration, no such task, or values not finite.
    """
    if folder.is_file():
        return _read_file(folder, task)
    config = _read_config(folder)
    tensors = _read_tensors(folder, config)
    prompt = soft_prompt(config, tensors, task, str(folder))
    return Adapter(prompt, tensors, config, read_sidecar(folder), folder)


def _read_file(file: Path, task: int) -> Adapter:
    """A bare file as a prompt-tuning adapter; a part of an adapter folder is not one."""
    if (file.parent / CONFIG).is_file() and file.name in (CONFIG, WEIGHTS, LEGACY_WEIGHTS):
        raise ForewordError("the file is a part of an adapter", str(file), f"give its folder, {file.parent}")
    rows = read_bare(file).values
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": rows.shape[0], "token_dim": rows.shape[1]}
    tensors = {TENSOR: rows}
    return Adapter(soft_prompt(config, tensors, task, str(file)), tensors, config, None, file)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ForewordError("no adapter in this folder (no adapter_config.json)", str(folder), _fix_for(folder))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ForewordError(f"not JSON: {e}", str(file), "train or download it again") from None
    found = dict(config) if isinstance(config, dict) else {}
    type_of(found, str(file))
    return found


def _read_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the configuration's type, apart from any graph."""
    file, legacy = folder / WEIGHTS, folder / LEGACY_WEIGHTS
    if file.is_file():
        found: Any = load_safetensors(file)
    elif legacy.is_file():
        file, found = legacy, load_pickle(legacy)
    else:
        raise ForewordError(f"the adapter has no weights ({WEIGHTS})", str(folder), "train or download it again")
    stored = found if isinstance(found, dict) else {}
    names = type_of(config, str(folder)).shapes
    missing = [name for name in names if not isinstance(stored.get(name), torch.Tensor)]
    if missing:
        raise ForewordError(
            f"there is no tensor '{missing[0]}', which a {config['peft_type']} adapter has",
            str(file),
            "train or download it again",
        )
    return {name: stored[name].detach() for name in names}


def _fix_for(folder: Path) -> str:
    if not folder.exists():
        return "check the path; hub ids look like user/name"
    if (folder / RECIPE).is_file():
        return "its training has not finished: run the same command with --resume"
    nested = [p.parent.name for p in folder.glob(f"*/{CONFIG}")]
    return f"give one of its subfolders: {', '.join(sorted(nested)[:5])}" if nested else "give a run or adapter folder"
