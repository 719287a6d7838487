"""Files of one tensor without any configuration, and how files of tensors are read at all.

Bare ``[P, H]`` tensors are what IBM (``decoder.pt``) and google-research/prompt-tuning (``.npy``) publish.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from foreword.artifact.atomic import write_atomic
from foreword.artifact.peft_types import finite
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt


def read_bare(file: Path) -> SoftPrompt:
    """The rows ``[P, H]`` of a file with one tensor, in float32.

    Nothing in such a file tells keys and values from rows: it is read as rows.

    Raises:
        ForewordError: another kind of file, a cut one, code in a pickle, no or several
            tensors, a shape that is not [P, H], or values that are not finite floats.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise ForewordError(f"no soft prompt is read from '{file.suffix}' files", str(file), f"give {_any_of(READERS)}")
    rows = _only(reader(file), file)
    if rows.dim() != 2 or 0 in rows.shape:
        raise ForewordError(
            f"the tensor has shape {list(rows.shape)}, not [virtual tokens, width]", str(file), "give rows [P, H]"
        )
    return SoftPrompt(finite(rows, str(file)))


def write_bare(file: Path, prompt: SoftPrompt) -> None:
    """Writes rows ``[P, H]`` as a bare float32 tensor: ``.pt`` of torch.save, or ``.npy``."""
    if prompt.kind == "prefix":
        raise ForewordError(
            "this soft prompt is keys and values of every layer, which a bare file would pass off as rows",
            str(file),
            "write an adapter folder",
        )
    encode = WRITERS.get(file.suffix.lower())
    if encode is None:
        raise ForewordError(
            f"no soft prompt is written to '{file.suffix}' files", str(file), f"give {_any_of(WRITERS)}"
        )
    rows = prompt.values.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
    content = io.BytesIO()
    encode(rows, content)
    write_atomic(file, content.getvalue())


def load_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name."""
    try:
        return load(_content(file))
    except SafetensorError as e:
        raise ForewordError(f"truncated or no safetensors file: {e}", str(file), "train or download it again") from None


def load_pickle(file: Path) -> Any:
    """What torch.save wrote, read without running any code in it."""
    content = io.BytesIO(_content(file))
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as e:  # the unpickler raises whatever a hostile or cut file makes it raise
        unsafe = "weights_only" in str(e) or "Unsupported" in str(e)
        what = "the pickle holds code, which is never run" if unsafe else "truncated or no torch.save file"
        raise ForewordError(what, str(file), "ask for a safetensors file") from None


def _load_npy(file: Path) -> torch.Tensor:
    """The array of a NumPy file; objects in it, which would be a pickle, are refused."""
    content = io.BytesIO(_content(file))
    try:
        array = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as e:  # whatever a cut or hostile header makes the parser raise
        pickled = "Object arrays" in str(e)
        what = "the array holds pickled objects, which are never run" if pickled else "truncated or no .npy file"
        raise ForewordError(what, str(file), "save a float32 array with numpy.save") from None
    if array.dtype.kind != "f":  # JAX's bfloat16 arrives as two bytes without a type
        raise ForewordError(
            f"the array's type is {array.dtype}, not a float that NumPy knows", str(file), "save it as float32"
        )
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as that
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise ForewordError(f"cannot read the file: {e.strerror}", str(file), "check the path and its rights") from None


def _only(found: Any, file: Path) -> torch.Tensor:
    """The tensor itself, or the one of a dictionary that is no scalar or vector (a step, say)."""
    if isinstance(found, torch.Tensor):
        return found
    entries = list(found.values()) if isinstance(found, dict) else []
    tensors = [t for t in entries if isinstance(t, torch.Tensor) and t.dim() > 1]
    if len(tensors) != 1:
        raise ForewordError(
            f"the file holds {len(tensors) or 'no'} tensors of two or more dimensions, not one",
            str(file),
            "give an adapter folder, or a file with the rows alone",
        )
    return tensors[0]


def _save_npy(rows: torch.Tensor, file: io.BytesIO) -> None:
    np.save(file, rows.numpy())


def _any_of(suffixes: dict[str, Any]) -> str:
    *others, last = suffixes
    return f"{', '.join(others)} or {last}"


READERS: dict[str, Callable[[Path], Any]] = {
    ".pt": load_pickle,
    ".pth": load_pickle,
    ".bin": load_pickle,
    ".npy": _load_npy,
    ".safetensors": load_safetensors,
}
WRITERS: dict[str, Callable[[torch.Tensor, io.BytesIO], None]] = {".pt": torch.save, ".npy": _save_npy}
