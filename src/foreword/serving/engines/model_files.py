"""A model's files without its weights in memory: what the gateway tells an engine that lives elsewhere.

The model is built without weights, and those that are asked for are read from its safetensors files: the
embedding table stays on the disk until rows of it are used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreword.backbone.fingerprint import fingerprint
from foreword.backbone.load import end_token, load_tokenizer, window_of
from foreword.backbone.source import or_cached, quiet_loading, resolve
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.serving import wire
from foreword.serving.engine import Rows

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROBES = 5
"""Tokens whose embeddings an engine may check its own against."""


@dataclass(frozen=True)
class ModelFiles:
    """A model built without weights (``skeleton``), and where to read them.

    ``source``: local folder or hub id.
    """

    source: str
    revision: str | None
    skeleton: Any
    end_id: int

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, ``V``."""
        return int(self.skeleton.get_input_embeddings().num_embeddings)

    @property
    def hidden_size(self) -> int:
        """Width of the embedding's output, ``H``."""
        return int(self.skeleton.get_input_embeddings().weight.shape[1])

    @property
    def window(self) -> int:
        """Most tokens the model reads at once."""
        return window_of(self.skeleton.config.get_text_config())

    @cached_property
    def table(self) -> torch.Tensor:
        """The embedding's weights ``[V, H]`` as they are stored, mapped from the file.

        Raises:
            ForewordError: no safetensors file holds them.
        """
        embedding = self.skeleton.get_input_embeddings()
        name = next(n for n, module in self.skeleton.named_modules() if module is embedding)
        key = self._key(f"{name}.weight")
        if key is None:
            raise ForewordError(
                "its embedding table is not found in safetensors files",
                self.source,
                "save the model with save_pretrained, or serve it with --engine transformers",
            )
        return self._read([key], self._file(self._places[key]))[key]

    def embed(self, ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What the embedding answers for token ids, ``[n, H]``, computed in ``dtype`` (some models scale it)."""
        embedding = self.skeleton.get_input_embeddings()
        rows = self.table[torch.tensor(ids, dtype=torch.long)].to(dtype)
        answer: torch.Tensor = torch.func.functional_call(embedding, {"weight": rows}, (torch.arange(len(rows)),))
        return answer

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """As the library's of the loaded model; empty where a weight of it is not in a file on this machine."""
        embedding = self.skeleton.get_input_embeddings().weight
        wanted = [n for n, p in self.skeleton.named_parameters() if p.dim() == 1 or p is embedding]
        keys = {n: key for n in wanted if (key := self._key(n))}
        files = {shard: self._file(shard, local_only=True) for shard in {self._places[k] for k in keys.values()}}
        if len(keys) < len(wanted) or not all(files.values()):
            return {}
        for shard, file in files.items():
            names = {key: n for n, key in keys.items() if self._places[key] == shard}
            weights = {names[key]: weight for key, weight in self._read(list(names), file).items()}
            self.skeleton.load_state_dict(weights, strict=False, assign=True)
        return fingerprint(self.skeleton, self.skeleton.config).as_dict()

    def probe(self) -> dict[str, Any]:
        """A few ids over the vocabulary, and their embeddings."""
        ids = [int(i) for i in np.linspace(1, self.vocab_size - 1, PROBES)]
        rows = self.embed(ids, torch.float32).numpy()
        return {"ids": ids, "rows": wire.pack_rows(Rows("probe", rows))}

    @cached_property
    def _places(self) -> dict[str, str]:
        """Which file holds which weight."""
        if index := self._file(INDEX):
            places: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
            return places
        file = self._file(SINGLE)
        return dict.fromkeys(_names(file), SINGLE) if file else {}

    def _key(self, name: str) -> str | None:
        """A weight's name in the files, which may lack the base model's name in front or have it beside."""
        front = f"{self.skeleton.base_model_prefix}."
        return next((n for n in (name, name.removeprefix(front), front + name) if n in self._places), None)

    def _file(self, name: str, local_only: bool = False) -> str | None:
        from transformers.utils import cached_file

        found: str | None = cached_file(
            self.source,
            name,
            revision=self.revision,
            local_files_only=local_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    def _read(self, keys: Sequence[str], file: str | None) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        assert file is not None
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in keys}


def open_files(model: str, revision: str | None = None) -> ModelFiles:
    """The files of a model by its name, as ``load_backbone`` takes it.

    Raises:
        ForewordError: there is no such model.
    """
    source = resolve(model)
    tokenizer, _ = load_tokenizer(ModelConfig(model, revision))
    if not Path(source).exists():
        source = or_cached(source, revision)
    skeleton, stated = _skeleton(source, revision)
    end_id = end_token([tokenizer.eos_token_id, stated, skeleton.config.get_text_config().eos_token_id], model)
    return ModelFiles(source, revision, skeleton, end_id)


def describe(files: ModelFiles) -> dict[str, Any]:
    """What ``VllmConfig`` takes of a model."""
    probe: dict[str, Any] = {}
    with suppress(ForewordError):
        probe = files.probe()
    return {
        "model": files.source,
        "revision": files.revision,
        "end_id": files.end_id,
        "vocab_size": files.vocab_size,
        "fingerprint": files.fingerprint,
        "probe": probe,
    }


def _skeleton(source: str, revision: str | None) -> tuple[Any, Any]:
    """The model without weights, and the end token of its way to generate."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with quiet_loading():
        config = AutoConfig.from_pretrained(source, revision=revision)
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(config)
        stated = None
        with suppress(OSError):
            stated = GenerationConfig.from_pretrained(source, revision=revision).eos_token_id
    return skeleton, stated


def _names(file: str) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())
