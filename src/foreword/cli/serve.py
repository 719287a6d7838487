"""``foreword serve``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foreword.config import field_docs
from foreword.serving.settings import ServeSettings

_DOCS, _DEFAULT = field_docs(ServeSettings), ServeSettings()


def _option(flag: str, field: str = "", **more: Any) -> Any:
    return typer.Option(flag, help=_DOCS[field or flag.removeprefix("--").replace("-", "_")], **more)


def serve(
    model: Annotated[str, _option("--model")] = _DEFAULT.model,
    prompts: Annotated[list[str] | None, _option("--prompts")] = None,
    name: Annotated[str, _option("--name")] = _DEFAULT.name,
    host: Annotated[str, _option("--host")] = _DEFAULT.host,
    port: Annotated[int, _option("--port", min=0, max=65535)] = _DEFAULT.port,
    engine: Annotated[str, _option("--engine")] = _DEFAULT.engine,
    vllm_url: Annotated[str, _option("--vllm-url")] = _DEFAULT.vllm_url,
    vllm_python: Annotated[str, _option("--vllm-python")] = _DEFAULT.vllm_python,
    revision: Annotated[str | None, _option("--revision")] = _DEFAULT.revision,
    dtype: Annotated[str, _option("--dtype")] = _DEFAULT.dtype,
    device: Annotated[str, _option("--device")] = _DEFAULT.device,
    kv_memory: Annotated[int, _option("--kv-memory", min=0)] = _DEFAULT.kv_memory,
    threads: Annotated[int, _option("--threads", min=0)] = _DEFAULT.threads,
    api_key: Annotated[list[str] | None, _option("--api-key", "api_keys")] = None,
    admin_key: Annotated[list[str] | None, _option("--admin-key", "admin_keys")] = None,
    prompt_memory: Annotated[int, _option("--prompt-memory", min=1)] = _DEFAULT.prompt_memory,
    max_queue: Annotated[int, _option("--max-queue", min=1)] = _DEFAULT.max_queue,
    max_body: Annotated[int, _option("--max-body", min=1)] = _DEFAULT.max_body,
    max_tokens: Annotated[int, _option("--max-tokens", min=1)] = _DEFAULT.max_tokens,
    max_texts: Annotated[int, _option("--max-texts", min=1)] = _DEFAULT.max_texts,
    request_seconds: Annotated[float, _option("--request-seconds", min=1)] = _DEFAULT.request_seconds,
    stall_seconds: Annotated[float, _option("--stall-seconds", min=1)] = _DEFAULT.stall_seconds,
    grace: Annotated[float, _option("--grace", min=0)] = _DEFAULT.grace,
) -> None:
    """Serve many soft prompts by an API like OpenAI's, on one model."""
    import os

    from foreword.serving.settings import check_settings, with_environment

    settings = ServeSettings(
        model=model,
        prompts=tuple(prompts or ()),
        name=name,
        host=host,
        port=port,
        engine=engine,
        vllm_url=vllm_url,
        vllm_python=vllm_python,
        revision=revision,
        dtype=dtype,
        device=device,
        kv_memory=kv_memory,
        threads=threads,
        api_keys=tuple(api_key or ()),
        admin_keys=tuple(admin_key or ()),
        prompt_memory=prompt_memory,
        max_queue=max_queue,
        max_body=max_body,
        max_tokens=max_tokens,
        max_texts=max_texts,
        request_seconds=request_seconds,
        stall_seconds=stall_seconds,
        grace=grace,
    )
    checked = check_settings(with_environment(settings, os.environ))

    from foreword.serving.gateway.launch import engine_of
    from foreword.serving.gateway.server import run

    run(checked, engine_of(checked), lambda line: typer.echo(line, err=True))
