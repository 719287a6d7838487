"""The engine that the settings ask for, not started yet."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from foreword.serving.engine import Engine
from foreword.serving.remote import RemoteEngine, worker_command
from foreword.serving.settings import VLLM_KEY, ServeSettings

SPARE = 1.25
"""Room for soft prompts in an engine, against what is kept loaded: while one is exchanged for another, both are
there, and those in use stay however many they are."""
CPU_KV_MEMORY = 1024
"""MB of keys and values of vLLM on a CPU, where its own choice is nearly all memory; on a GPU that is right."""
VLLM_PYTHON = Path(".venv-vllm/bin/python")
"""Where ``make vllm-env`` puts vLLM's environment."""


def engine_of(settings: ServeSettings) -> Engine:
    """An engine in a process of its own, which is started again when it dies."""
    if settings.vllm_url:
        return vllm_server(settings)
    if settings.engine == "vllm":
        command, env = worker_command("vllm", settings.vllm_python or found_vllm())
        return RemoteEngine(command, vllm_config(settings), env)
    command, env = worker_command("transformers")
    return RemoteEngine(command, engine_config(settings), env)


def vllm_server(settings: ServeSettings) -> Engine:
    """The engine on a vLLM server that runs already."""
    from foreword.serving.engines.vllm_http import VllmHttpConfig, VllmHttpEngine

    return VllmHttpEngine(
        VllmHttpConfig(
            settings.vllm_url.rstrip("/"),
            settings.model,
            settings.revision,
            os.environ.get(VLLM_KEY, ""),
            dtype=settings.dtype,
            prompt_memory=settings.prompt_memory * SPARE,
        )
    )


def found_vllm() -> str | None:
    """The Python of vLLM's environment, where it lies in this folder; else vLLM may be in our own."""
    return str(VLLM_PYTHON.absolute()) if VLLM_PYTHON.is_file() else None


def engine_config(settings: ServeSettings) -> dict[str, Any]:
    """What the embedded engine is told."""
    from foreword.serving.engines.transformers import TransformersConfig

    known = TransformersConfig(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        prompt_memory=settings.prompt_memory * SPARE,
        threads=settings.threads,
    )
    return asdict(known) | ({"kv_memory": settings.kv_memory} if settings.kv_memory else {})


def vllm_config(settings: ServeSettings) -> dict[str, Any]:
    """What a worker with vLLM is told: it reads no model's files in our way."""
    import torch

    from foreword.serving.engines.model_files import describe, open_files

    return describe(open_files(settings.model, settings.revision)) | {
        "dtype": settings.dtype,
        "prompt_memory": settings.prompt_memory * SPARE,
        "kv_memory": settings.kv_memory or (0 if torch.cuda.is_available() else CPU_KV_MEMORY),
        "threads": settings.threads,
    }
