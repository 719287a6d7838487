"""Files of one tensor: what comes back bit for bit, what is cast, and what is refused."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import save_file

from foreword.artifact.bare import read_bare, write_bare
from foreword.artifact.folder import WEIGHTS, read_adapter, write_adapter
from foreword.errors import ForewordError
from foreword.prompts.soft import SoftPrompt

SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=6)
FINITE = {"allow_nan": False, "allow_infinity": False}
ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def refusal(file: Path, task: int = 0) -> str:
    with pytest.raises(ForewordError) as caught:
        read_adapter(file, task)
    assert str(file) in caught.value.where
    assert "\n" not in caught.value.what
    return caught.value.what


# --- what comes back --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".PT"])
@settings(max_examples=30, deadline=None)
@given(values=arrays(np.float32, SHAPES, elements=st.floats(width=32, **FINITE)))
def test_rows_come_back_bit_for_bit(suffix: str, values: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"prompt{suffix}"
        write_bare(file, SoftPrompt(torch.from_numpy(values)))
        found = read_bare(file)
    assert found.kind == "rows"
    assert found.values.numpy().tobytes() == values.tobytes()


@settings(max_examples=30, deadline=None)
@given(
    values=st.sampled_from([np.float16, np.float32, np.float64]).flatmap(
        lambda dtype: arrays(dtype, SHAPES, elements=st.floats(-6e4, 6e4, width=16))
    ),
    order=st.sampled_from("CF"),
    big_endian=st.booleans(),
)
def test_any_float_array_of_numpy_is_read_as_float32(values: Any, order: Any, big_endian: bool) -> None:
    stored = np.asarray(values.astype(values.dtype.newbyteorder(">" if big_endian else "<")), order=order)
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "prompt.npy", stored)
        found = read_bare(Path(place) / "prompt.npy").values
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), values.astype(np.float32))


def saved(form: str, folder: Path, content: Any) -> Path:
    file = folder / f"prompt{form}"
    if form == ".safetensors":
        save_file(content if isinstance(content, dict) else {"prompt": content}, file)
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize("form", [".pt", ".bin", ".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_form_is_read_as_a_prompt_tuning_adapter(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    file = saved(form, tmp_path, {"rows": ROWS.to(dtype), "step": torch.tensor(7)})
    found = read_adapter(file)
    assert found.prompt.values.dtype == torch.float32
    assert torch.equal(found.prompt.values, ROWS.to(dtype).float())
    assert found.config == {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "token_dim": 8}
    assert (found.tensors.keys(), found.sidecar, found.folder) == ({"prompt_embeddings"}, None, file)
    assert torch.equal(read_adapter(saved(form, tmp_path, ROWS.to(dtype))).prompt.values, found.prompt.values)


def test_a_parameter_comes_back_without_a_gradient(tmp_path: Path) -> None:
    assert not read_bare(saved(".pt", tmp_path, torch.nn.Parameter(ROWS))).values.requires_grad


def test_a_bare_file_becomes_an_adapter_folder(tmp_path: Path) -> None:
    found = read_adapter(saved(".pt", tmp_path, ROWS))
    write_adapter(tmp_path / "run", found.tensors, found.config, None)
    assert torch.equal(read_adapter(tmp_path / "run").prompt.values, ROWS)


def test_of_a_view_its_own_rows_alone_are_written(tmp_path: Path) -> None:
    table = torch.randn(1000, 8, requires_grad=True)
    write_bare(tmp_path / "prompt.pt", SoftPrompt(table[5:8].flip(1)))
    assert torch.equal(read_bare(tmp_path / "prompt.pt").values, table[5:8].flip(1))
    assert (tmp_path / "prompt.pt").stat().st_size < 4096


# --- what is refused --------------------------------------------------------------------------


class Malice:
    """Unpickling it makes a folder: the proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    np.save(tmp_path / "objects.npy", np.array([[Malice(proof)]], dtype=object), allow_pickle=True)
    assert "holds code, which is never run" in refusal(saved(".pt", tmp_path, {"rows": Malice(proof)}))
    assert "pickled objects, which are never run" in refusal(tmp_path / "objects.npy")
    (tmp_path / "prompt.pt").rename(tmp_path / "pickle.npy")
    assert "no .npy file" in refusal(tmp_path / "pickle.npy")
    assert not proof.exists()
    np.load(tmp_path / "objects.npy", allow_pickle=True)
    assert proof.exists(), "the same file does run code in a reader that lets it"


@pytest.mark.parametrize("form", [".pt", ".npy", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.6, 0.95])
def test_a_cut_file_is_refused(tmp_path: Path, form: str, keep: float) -> None:
    file = tmp_path / f"prompt{form}"
    write_bare(file, SoftPrompt(ROWS)) if form != ".safetensors" else saved(form, tmp_path, ROWS)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    assert "truncated or no" in refusal(file)


def as_npy(array: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.save(folder / "prompt.npy", array)
        return folder / "prompt.npy"

    return make


def as_pt(content: Any) -> Callable[[Path], Path]:
    return lambda folder: saved(".pt", folder, content)


def as_npz(folder: Path) -> Path:
    with (folder / "prompt.npy").open("wb") as f:
        np.savez(f, rows=ROWS.numpy())
    return folder / "prompt.npy"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "NaN": (as_pt(torch.full((2, 2), float("nan"))), "NaN, infinite"),
    "infinity": (as_npy(np.full((2, 2), np.inf, np.float32)), "NaN, infinite"),
    "beyond float32": (as_npy(np.full((2, 2), 1e300)), "NaN, infinite"),
    "integers": (as_pt(torch.ones(2, 2, dtype=torch.int64)), "non-float"),
    "integers of NumPy": (as_npy(np.ones((2, 2), np.int32)), "type is int32"),
    "two bytes without a type": (as_npy(np.zeros((2, 2), "V2")), "type is |V2"),
    "sparse": (as_pt(ROWS.to_sparse()), "non-float"),
    "one dimension": (as_pt(torch.ones(8)), "shape [8], not"),
    "three dimensions": (as_npy(np.ones((2, 2, 2))), "shape [2, 2, 2], not"),
    "three dimensions in a dictionary": (as_pt({"rows": torch.ones(2, 2, 2)}), "shape [2, 2, 2], not"),
    "no rows": (as_pt(torch.ones(0, 8)), "shape [0, 8], not"),
    "two tensors": (as_pt({"a": ROWS, "b": ROWS}), "holds 2 tensors"),
    "a multitask adapter's": (as_pt({"prompt_embeddings": ROWS, "prefix_task_cols": torch.ones(1, 3, 2)}), "2 tensors"),
    "no tensor": (as_pt({"step": 3}), "holds no tensors"),
    "a list": (as_pt([ROWS]), "holds no tensors"),
    "several arrays": (as_npz, "no .npy file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_soft_prompt_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    make, reason = REFUSED[kind]
    assert reason in refusal(make(tmp_path))


def test_another_kind_of_file_is_refused_by_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "prompt.json").write_text("[[1.0]]")
    assert "read from '.json' files" in refusal(tmp_path / "prompt.json")
    with pytest.raises(ForewordError, match=r"written to '\.bin' files") as caught:
        write_bare(tmp_path / "prompt.bin", SoftPrompt(ROWS))
    assert caught.value.fix == "give .pt or .npy"


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ForewordError, match="cannot read the file"):
        read_bare(tmp_path / "prompt.pt")


def test_a_bare_file_has_one_task(tmp_path: Path) -> None:
    assert "it has task 0 alone" in refusal(saved(".pt", tmp_path, ROWS), 1)


def test_a_part_of_an_adapter_folder_is_no_bare_file(tmp_path: Path) -> None:
    """Its configuration says what the tensor is: a prefix would be read as rows."""
    write_adapter(tmp_path, {"prompt_embeddings": ROWS}, {"peft_type": "PREFIX_TUNING"}, None)
    assert "a part of an adapter" in refusal(tmp_path / WEIGHTS)


def test_a_prefix_is_never_written_as_a_bare_file(tmp_path: Path) -> None:
    with pytest.raises(ForewordError, match="which a bare file would pass off as rows"):
        write_bare(tmp_path / "prompt.pt", SoftPrompt(ROWS, "prefix"))
    assert not list(tmp_path.iterdir())
