"""The adapter folder: what is written, what is read back, and every damaged folder that is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from foreword.artifact import atomic
from foreword.artifact import folder as adapter_folder
from foreword.artifact.folder import CONFIG, LEGACY_WEIGHTS, TENSOR, WEIGHTS, read_adapter, write_adapter
from foreword.artifact.lock import run_folder
from foreword.artifact.peft_types import TYPES, peft_config
from foreword.artifact.sidecar import SIDECAR, Sidecar
from foreword.config import PromptConfig, Recipe
from foreword.errors import ForewordError
from foreword.records import Task

MODEL = SimpleNamespace(num_attention_heads=4, num_hidden_layers=2)
SIDE = Sidecar(
    task=Task("Tweet : {text} Label :", " ", "label", ("complaint", "no_complaint"), ("complaint", "größe | ok"), 64),
    backbone={"name": "user/base", "revision": None},
    scores={"n": 3, "accuracy": 1.0},
    training={"rows": 9, "label_counts": [4, 5]},
    versions={"foreword": "0.1.0"},
)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def some_rows(p: int = 3, h: int = 8) -> torch.Tensor:
    return torch.randn(p, h, generator=torch.Generator().manual_seed(0))


def config_of(rows: torch.Tensor) -> dict[str, Any]:
    more: dict[str, Any] = {"base": "user/base", "revision": None, "prompt": PromptConfig()}
    return peft_config("PROMPT_TUNING", {TENSOR: rows}, model_config=MODEL, **more)


def written(folder: Path, rows: torch.Tensor | None = None, sidecar: Sidecar | None = None, **more: Any) -> Path:
    rows = some_rows() if rows is None else rows
    write_adapter(folder, {TENSOR: rows}, {**config_of(rows), **more}, sidecar)
    return folder


def refusal(folder: Path) -> ForewordError:
    with pytest.raises(ForewordError) as caught:
        read_adapter(folder)
    assert all((caught.value.what, caught.value.where, caught.value.fix))
    assert "\n" not in caught.value.what, "the error has one line for what happened"
    return caught.value


def bits(rows: torch.Tensor) -> bytes:
    return np.ascontiguousarray(rows.numpy()).tobytes()


# --- what is written -------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5).flatmap(lambda p: st.integers(1, 6).map(lambda h: (p, h))), st.data())
def test_rows_config_and_sidecar_come_back_bit_for_bit(shape: tuple[int, int], data: st.DataObject) -> None:
    p, h = shape
    values = data.draw(st.lists(FINITE, min_size=p * h, max_size=p * h))
    rows = torch.tensor(values, dtype=torch.float32).view(p, h)
    with tempfile.TemporaryDirectory() as place:
        folder = written(Path(place), rows, SIDE)
        found = read_adapter(folder)
        assert bits(found.prompt.values) == bits(rows)
        assert found.config == config_of(rows)
        assert found.sidecar == SIDE


def test_the_header_is_the_one_peft_writes(tmp_path: Path) -> None:
    content = (written(tmp_path) / WEIGHTS).read_bytes()
    header = b'{"__metadata__":{"format":"pt"},"prompt_embeddings":{"dtype":"F32","shape":[3,8],"data_offsets":[0,96]}}'
    header += b" " * (-len(header) % 8)
    assert content == len(header).to_bytes(8, "little") + header + bits(some_rows())


def test_eight_tokens_of_width_1024_take_32888_bytes(tmp_path: Path) -> None:
    folder = written(tmp_path, some_rows(8, 1024))
    assert (folder / WEIGHTS).stat().st_size == 32_888


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_float_type_are_stored_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    found = read_adapter(written(tmp_path, some_rows().to(dtype))).tensors[TENSOR]
    assert (found.dtype, found.tolist()) == (torch.float32, some_rows().to(dtype).tolist())


def test_rows_that_are_a_view_or_need_gradients_are_stored_whole(tmp_path: Path) -> None:
    rows = some_rows(8, 3).requires_grad_().T
    assert torch.equal(read_adapter(written(tmp_path, rows)).prompt.values, rows.detach())


def test_unknown_config_keys_survive_a_re_save(tmp_path: Path) -> None:
    first = written(tmp_path / "a", zebra={"of": "another tool"}, alpha="größer")
    found = read_adapter(first)
    write_adapter(tmp_path / "b", found.tensors, found.config, found.sidecar)
    assert (tmp_path / "b" / CONFIG).read_bytes() == (first / CONFIG).read_bytes()
    assert read_adapter(tmp_path / "b").config["zebra"] == {"of": "another tool"}
    keys = list(json.loads((first / CONFIG).read_text()))
    assert keys == sorted(keys), "as PEFT writes them"


def test_the_sidecar_survives_a_re_save_byte_for_byte(tmp_path: Path) -> None:
    first = written(tmp_path / "a", sidecar=SIDE)
    found = read_adapter(first)
    write_adapter(tmp_path / "b", found.tensors, found.config, found.sidecar)
    assert (tmp_path / "b" / SIDECAR).read_bytes() == (first / SIDECAR).read_bytes()


def test_a_sidecar_key_of_a_later_foreword_is_passed_over(tmp_path: Path) -> None:
    file = written(tmp_path, sidecar=SIDE) / SIDECAR
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "later": 1}), encoding="utf-8")
    assert read_adapter(tmp_path).sidecar == SIDE


# --- what is refused -------------------------------------------------------------------------


def cut(file: str, keep: float) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * keep)])

    return damage


def as_folder(file: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return damage


def with_tensors(tensors: dict[str, torch.Tensor]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(save(tensors))


def with_value(value: float) -> Callable[[Path], object]:
    rows = some_rows()
    rows[1, 2] = value
    return with_tensors({TENSOR: rows})


def with_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_text(text, encoding="utf-8")


def changed_config(**more: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **more}))

    return damage


def with_sidecar(**more: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = {"format": 1, **dataclasses.asdict(SIDE), **more}
        (folder / SIDECAR).write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter_config.json"),
    "config cut": (cut(CONFIG, 0.5), "not JSON"),
    "config in UTF-16": (lambda f: (f / CONFIG).write_bytes("{}".encode("utf-16")), "not JSON"),
    "config is a list": (with_config("[1]"), "type is None; read are PROMPT_TUNING, P_TUNING"),
    "config is nested too deeply": (with_config("[" * 100_000), "not JSON"),
    "another peft type": (changed_config(peft_type="LORA"), f"LORA; read are {', '.join(TYPES)}"),
    "no peft type": (changed_config(peft_type=None), "PROMPT_TUNING"),
    "a list for a peft type": (changed_config(peft_type=["CPT"]), "PROMPT_TUNING"),
    "trained modules of the model": (changed_config(modules_to_save=["lm_head"]), "trained modules"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no weights"),
    "weights are a folder": (as_folder(WEIGHTS), "no weights"),
    "weights cut in the values": (cut(WEIGHTS, 0.9), "truncated"),
    "weights cut in the header": (cut(WEIGHTS, 0.2), "truncated"),
    "weights empty": (cut(WEIGHTS, 0), "truncated"),
    "weights of another name": (with_tensors({"weight": some_rows()}), "no tensor 'prompt_embeddings'"),
    "NaN": (with_value(float("nan")), "NaN, infinite"),
    "infinity": (with_value(float("-inf")), "NaN, infinite"),
    "beyond float32": (with_tensors({TENSOR: torch.full((3, 8), 1e300, dtype=torch.float64)}), "infinite"),
    "integers": (with_tensors({TENSOR: torch.ones(3, 8, dtype=torch.int64)}), "non-float"),
    "another width": (with_tensors({TENSOR: some_rows(3, 7)}), "[3, 7], its configuration says [3, 8]"),
    "another length": (changed_config(num_virtual_tokens=4), "[3, 8], its configuration says [4, 8]"),
    "one dimension": (with_tensors({TENSOR: torch.ones(24)}), "shape [24]"),
    "no rows": (with_tensors({TENSOR: torch.ones(0, 8)}), "shape [0, 8]"),
    "sidecar cut": (lambda f: (with_sidecar()(f), cut(SIDECAR, 0.5)(f)), "damaged sidecar"),
    "sidecar without a task": (with_sidecar(task="gone"), "damaged sidecar"),
    "sidecar with a list for a table": (with_sidecar(scores=[1, 2]), "damaged sidecar"),
    "sidecar that is a list": (lambda f: (f / SIDECAR).write_text("[]"), "damaged sidecar"),
    "sidecar with fewer words than classes": (
        with_sidecar(task={**dataclasses.asdict(SIDE.task), "words": ["one"]}),
        "damaged sidecar",
    ),
    "sidecar with fewer biases than classes": (
        with_sidecar(task={**dataclasses.asdict(SIDE.task), "biases": [0.5]}),
        "damaged sidecar",
    ),
    "sidecar with a bias that is none": (
        with_sidecar(task={**dataclasses.asdict(SIDE.task), "biases": [float("nan")] * len(SIDE.task.classes)}),
        "damaged sidecar",
    ),
    "newer sidecar": (with_sidecar(format=2), "sidecar format 2, this Foreword reads 1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    damage(written(tmp_path / "run"))
    error = refusal(tmp_path / "run")
    assert reason in error.what
    assert str(tmp_path) in error.where


def test_a_partly_specified_config_is_still_held_against_the_rows(tmp_path: Path) -> None:
    written(tmp_path)
    changed_config(num_virtual_tokens=None, token_dim=9)(tmp_path)
    assert "[3, 8]" in refusal(tmp_path).what


def test_a_missing_folder_is_refused_by_its_path(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nowhere")
    assert "check the path" in error.fix


def test_the_folder_above_an_adapter_names_the_subfolder(tmp_path: Path) -> None:
    written(tmp_path / "tweets")
    assert "tweets" in refusal(tmp_path).fix


def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {}\n")
    assert "--resume" in refusal(tmp_path).fix


# --- the older .bin ---------------------------------------------------------------------------


def legacy(folder: Path) -> Path:
    """An adapter folder whose weights would lie in ``adapter_model.bin``; gives that path."""
    (written(folder) / WEIGHTS).unlink()
    return folder / LEGACY_WEIGHTS


def test_a_legacy_file_of_torch_save_is_read(tmp_path: Path) -> None:
    torch.save({TENSOR: some_rows()}, legacy(tmp_path))
    assert torch.equal(read_adapter(tmp_path).prompt.values, some_rows())


def test_safetensors_is_preferred_to_a_legacy_file(tmp_path: Path) -> None:
    torch.save({TENSOR: some_rows() + 1}, written(tmp_path) / LEGACY_WEIGHTS)
    assert torch.equal(read_adapter(tmp_path).prompt.values, some_rows())


class Malice:
    """Unpickling it writes a file: the proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def hostile(form: str, file: Path, proof: Path) -> None:
    if form == "torch.save":
        torch.save({TENSOR: Malice(proof)}, file)
    else:
        file.write_bytes(pickle.dumps({TENSOR: Malice(proof)}, protocol=2))


@pytest.mark.parametrize("form", ["torch.save", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, form: str) -> None:
    proof = tmp_path / "proof"
    file = legacy(tmp_path / "run")
    hostile(form, file, proof)
    assert "holds code, which is never run" in refusal(tmp_path / "run").what
    assert not proof.exists()
    with file.open("rb") as f:  # the same file does run code in a reader that lets it
        torch.load(f, weights_only=False) if form == "torch.save" else pickle.load(f)
    assert proof.exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.95])
def test_a_truncated_legacy_file_is_refused(tmp_path: Path, keep: float) -> None:
    file = legacy(tmp_path)
    torch.save({TENSOR: some_rows(8, 64)}, file)
    cut(LEGACY_WEIGHTS, keep)(tmp_path)
    assert "truncated or no torch.save file" in refusal(tmp_path).what


def test_a_legacy_file_holding_a_sparse_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({TENSOR: some_rows().to_sparse()}, legacy(tmp_path))
    assert "non-float" in refusal(tmp_path).what


def test_rows_saved_as_a_parameter_come_back_without_a_gradient(tmp_path: Path) -> None:
    torch.save({TENSOR: torch.nn.Parameter(some_rows())}, legacy(tmp_path))
    assert not read_adapter(tmp_path).prompt.values.requires_grad


def test_a_legacy_file_holding_no_dictionary_is_refused(tmp_path: Path) -> None:
    torch.save([some_rows()], legacy(tmp_path))
    assert "no tensor" in refusal(tmp_path).what


# --- nothing half-written ---------------------------------------------------------------------


@pytest.mark.parametrize("file", [WEIGHTS, SIDECAR, CONFIG])
def test_a_failed_write_leaves_the_old_files_whole(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, stood in for by the system call that reports it."""
    before = read_adapter(written(tmp_path, sidecar=SIDE))
    contents = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    real, fsync = atomic.write_atomic, os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(path: Path, content: bytes) -> None:
        monkeypatch.setattr(os, "fsync", full if path.name == file else fsync)
        real(path, content)

    monkeypatch.setattr(adapter_folder, "write_atomic", write)
    with pytest.raises(ForewordError, match="No space left"):
        write_adapter(tmp_path, before.tensors, before.config, before.sidecar)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == contents


def test_a_killed_first_write_is_no_adapter_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration comes last, so weights alone are never taken for a finished adapter."""
    real = atomic.write_atomic

    def killed(path: Path, content: bytes) -> None:
        if path.name == CONFIG:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(adapter_folder, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, sidecar=SIDE)
    assert (tmp_path / WEIGHTS).exists()
    assert "no adapter in this folder" in refusal(tmp_path).what


def test_a_folder_that_cannot_be_made_is_an_error_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ForewordError) as caught:
        written(tmp_path / "file")
    assert str(tmp_path / "file") in caught.value.where


# --- one folder, one writer -------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ForewordError, match="another run is writing here")
    with run_folder(tmp_path / "run", resume=False), refused, run_folder(tmp_path / "run", resume=True):
        pytest.fail("two writers in one folder")


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ForewordError, match=r"not empty \(it holds notes.txt"), run_folder(tmp_path, False):
        pytest.fail("a foreign folder was taken")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), run_folder(tmp_path / "run", False):
        raise RuntimeError
    assert not (tmp_path / "run").exists()


def test_a_shared_recipe_names_files_without_their_folders(tmp_path: Path) -> None:
    from foreword.artifact.hub import _without_folders
    from foreword.recipe import load_recipe, merge, to_yaml

    here = tmp_path / "somewhere" / "train.csv"
    nested = {"data": {"path": str(here), "eval_path": "user/tweets:config"}, "model": {"id": "maker/model"}}
    (tmp_path / "recipe.yaml").write_text(to_yaml(merge(Recipe(), nested, "test")))
    (tmp_path / "shared.yaml").write_bytes(_without_folders(tmp_path / "recipe.yaml"))
    shared = load_recipe(tmp_path / "shared.yaml")
    found = (shared.data.path, shared.data.eval_path, shared.model.id)
    assert found == ("train.csv", "user/tweets:config", "maker/model")
