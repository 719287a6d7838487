"""A soft prompt for other tools: a bare file of rows, or PEFT's folder without anything of ours."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from foreword.artifact.bare import write_bare
from foreword.artifact.folder import Adapter, read_adapter, write_adapter
from foreword.artifact.hub import locate
from foreword.artifact.peft_types import PLACED, TENSOR
from foreword.errors import ForewordError

AS_PEFT = {"task_type": "CAUSAL_LM", "inference_mode": True}
"""Of these a bare file says nothing, and PEFT without a task type passes over the soft prompt in silence."""

MULTITASK_KEYS = ("num_ranks", "num_tasks", "prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
PLAIN = {
    "peft_type": "PROMPT_TUNING",
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_name_or_path": None,
}
"""What makes plain prompt tuning of a multitask configuration without its own keys."""


def export(source: str, target: Path, task: int | None = None) -> Adapter:
    """Writes the rows to a bare file (``.pt``, ``.npy``), or tensors and configuration to a folder (no suffix).

    Args:
        source: run or adapter folder, bare file or hub id.
        target: the file or folder; a new one.
        task: whose soft prompt to write of an adapter of several tasks; None: a folder gets all of them.

    Returns:
        The source.

    Raises:
        ForewordError: something is there already, or the soft prompt does not fit that form.
    """
    adapter = read_adapter(locate(source), task or 0)
    if target.exists() or target.is_symlink():
        raise ForewordError("it is there already", str(target), "give another name")
    if not target.absolute().parent.is_dir():
        raise ForewordError("there is no such folder", str(target.parent), f"mkdir -p {target.parent}")
    tasks = adapter.config.get("num_tasks") or 1
    if target.suffix:
        if task is None and tasks > 1:
            raise ForewordError(f"it has {tasks} tasks, a bare file one", source, f"add --task, 0 to {tasks - 1}")
        write_bare(target, adapter.prompt)
    else:
        _write_folder(target, *_of_peft(adapter, task))
    return adapter


def _of_peft(adapter: Adapter, task: int | None) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """Tensors and configuration; those of one task alone are plain prompt tuning."""
    if adapter.config["peft_type"] == PLACED:
        raise ForewordError(
            "its virtual tokens do not stand in front of the text, and PEFT has no field for another place",
            str(adapter.folder),
            "export its rows as a .pt or .npy file",
        )
    config = {**AS_PEFT, **adapter.config}
    if task is None or "num_tasks" not in config:
        return adapter.tensors, config
    plain = {key: value for key, value in config.items() if key not in MULTITASK_KEYS}
    return {TENSOR: adapter.prompt.values}, {**plain, **PLAIN}


def _write_folder(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """A folder that is new and whole, or none."""
    try:
        folder.mkdir()
        write_adapter(folder, tensors, config, sidecar=None)
    except OSError as e:
        raise ForewordError(f"cannot make the folder: {e.strerror}", str(folder), "give another name") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
