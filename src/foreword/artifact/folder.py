"""The adapter folder: PEFT's format byte for byte, plus ``foreword.json``.

Format observed on peft 0.21.2: ``adapter_config.json`` is sorted, indented JSON without a
trailing newline; ``adapter_model.safetensors`` holds ``prompt_embeddings`` [P, H] in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from foreword.artifact.atomic import write_atomic
from foreword.artifact.sidecar import SIDECAR, Sidecar, read_sidecar
from foreword.errors import ForewordError
from foreword.recipe import RECIPE

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LEGACY_WEIGHTS = "adapter_model.bin"
TENSOR = "prompt_embeddings"
PEFT_VERSION = "0.21.2"
"""Version of the format written; tests hold it against the installed PEFT."""


@dataclass(frozen=True)
class Adapter:
    """A soft prompt as it lies in a folder.

    ``rows`` is ``[P, H]`` float32; ``config`` is PEFT's configuration, unknown keys included.
    """

    rows: torch.Tensor
    config: Mapping[str, Any]
    sidecar: Sidecar | None
    folder: Path


def peft_config(
    rows: torch.Tensor, model_config: Any, base: str, revision: str | None, init_text: str | None
) -> dict[str, Any]:
    """PEFT's configuration of a prompt-tuning adapter with these rows ``[P, H]``."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": getattr(model_config, "num_attention_heads", None),
        "num_layers": model_config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": rows.shape[0],
        "peft_type": "PROMPT_TUNING",
        "peft_version": PEFT_VERSION,
        "prompt_tuning_init": "TEXT" if init_text else "RANDOM",
        "prompt_tuning_init_text": init_text,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "token_dim": rows.shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": base if init_text else None,
    }


def write_adapter(folder: Path, rows: torch.Tensor, config: Mapping[str, Any], sidecar: Sidecar | None) -> None:
    """Writes weights, configuration and sidecar, each atomically; the configuration comes last."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ForewordError(f"cannot make the folder: {e.strerror}", str(folder), "give another folder") from None
    write_atomic(folder / WEIGHTS, weights_bytes(rows))
    if sidecar is not None:
        write_atomic(folder / SIDECAR, sidecar.to_json().encode())
    write_atomic(folder / CONFIG, json.dumps(dict(config), indent=2, sort_keys=True).encode())


def weights_bytes(rows: torch.Tensor) -> bytes:
    """The safetensors file of rows ``[P, H]``."""
    tensor = rows.detach().to("cpu", torch.float32).contiguous()
    return save({TENSOR: tensor}, metadata={"format": "pt"})


def read_adapter(folder: Path) -> Adapter:
    """Reads and validates an adapter folder, ours or PEFT's.

    Raises:
        ForewordError: no adapter there, another PEFT type, a truncated or foreign file, code
            in a pickle, a shape that is not [P, H], or values that are not finite.
    """
    config = _read_config(folder)
    rows = _checked(_read_rows(folder), config, str(folder))
    return Adapter(rows, config, read_sidecar(folder), folder)


def _checked(rows: torch.Tensor, config: Mapping[str, Any], place: str) -> torch.Tensor:
    """The rows ``[P, H]`` in float32, if they are what the configuration says and finite."""
    expected = (config.get("num_virtual_tokens"), config.get("token_dim"))
    agrees = rows.dim() == 2 and all(e in (None, n) for e, n in zip(expected, rows.shape, strict=True))
    if not agrees or 0 in rows.shape:
        raise ForewordError(
            f"the soft prompt has shape {list(rows.shape)}, its configuration says {list(expected)}",
            place,
            "train or download it again",
        )
    plain = rows.is_floating_point() and rows.layout == torch.strided
    values = rows.detach().float() if plain else rows  # cast first: float64 may overflow float32
    if not plain or not torch.isfinite(values).all():
        raise ForewordError("the soft prompt holds NaN, infinite or non-float values", place, "train it again")
    return values


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ForewordError("no adapter in this folder (no adapter_config.json)", str(folder), _fix_for(folder))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ForewordError(f"not JSON: {e}", str(file), "train or download it again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "PROMPT_TUNING":
        raise ForewordError(
            f"the adapter's type is {kind}, not PROMPT_TUNING", str(file), "load it with the tool that made it"
        )
    return dict(config)


def _read_rows(folder: Path) -> torch.Tensor:
    file, legacy = folder / WEIGHTS, folder / LEGACY_WEIGHTS
    if file.is_file():
        try:
            tensors = load(file.read_bytes())
        except SafetensorError as e:
            raise ForewordError(
                f"truncated or no safetensors file: {e}", str(file), "train or download it again"
            ) from None
    elif legacy.is_file():
        file = legacy
        tensors = _read_legacy(legacy)
    else:
        raise ForewordError(f"the adapter has no weights ({WEIGHTS})", str(folder), "train or download it again")
    if not isinstance(tensors, dict) or not isinstance(tensors.get(TENSOR), torch.Tensor):
        raise ForewordError(f"there is no tensor '{TENSOR}'", str(file), "give a PROMPT_TUNING adapter")
    rows: torch.Tensor = tensors[TENSOR]
    return rows


def _read_legacy(file: Path) -> Any:
    """A torch.save dictionary, read without running any code in it."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # the unpickler raises whatever a hostile or cut file makes it raise
        unsafe = "weights_only" in str(e) or "Unsupported" in str(e)
        what = "the pickle holds code, which is never run" if unsafe else "truncated or no torch.save file"
        raise ForewordError(what, str(file), "ask for a safetensors file") from None


def _fix_for(folder: Path) -> str:
    if not folder.exists():
        return "check the path; hub ids look like user/name"
    if (folder / RECIPE).is_file():
        return "its training has not finished: run the same command with --resume"
    nested = [p.parent.name for p in folder.glob(f"*/{CONFIG}")]
    return f"give one of its subfolders: {', '.join(sorted(nested)[:5])}" if nested else "give a run or adapter folder"
