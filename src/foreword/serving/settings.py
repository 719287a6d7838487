"""What ``foreword serve`` can be told: a field's docstring is its help on the command line."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace

from foreword.errors import ForewordError, nearest

ENGINES = ("transformers", "vllm")
USER_KEYS, ADMIN_KEYS = "FOREWORD_API_KEYS", "FOREWORD_ADMIN_KEYS"
VLLM_KEY = "FOREWORD_VLLM_KEY"
"""The environment's variable with the key of the server at --vllm-url, if it wants one."""
MB = 2**20


@dataclass(frozen=True)
class ServeSettings:
    """Everything about a server."""

    model: str = ""
    """Backbone: hub id, folder, .gguf, smollm2-135m; with --vllm-url the name of the server's model."""
    prompts: tuple[str, ...] = ()
    """A soft prompt (run or adapter folder, ensemble, hub id), or a folder of such; may be given several times."""
    name: str = ""
    """The model's name in the API; else that of --model."""
    host: str = "127.0.0.1"
    """Address to listen on; another one than this machine's own loopback needs keys."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    engine: str = "transformers"
    """What runs the model: transformers, or vllm (in an environment of its own)."""
    vllm_url: str = ""
    """A vLLM server with prompt embeds to use, instead of starting one: http://HOST:PORT. Its key, if it wants
    one, is taken from FOREWORD_VLLM_KEY."""
    vllm_python: str = ""
    """The Python of vLLM's environment; else that of make vllm-env in this folder (.venv-vllm), else this one."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = "auto"
    """The weights' type: auto, float32, bfloat16, float16."""
    device: str = "auto"
    """Where the model runs: auto, cuda, cuda:N, mps, cpu."""
    kv_memory: int = 0
    """MB of keys and values kept for running requests and shared beginnings; 0: 1024, or on a GPU with vLLM
    what is free there."""
    threads: int = 0
    """CPU threads of the model; 0: the engine's own choice."""
    api_keys: tuple[str, ...] = ()
    """A key that may use the API; may be given several times. Better in FOREWORD_API_KEYS (commas between), as
    other users of the machine can read command lines."""
    admin_keys: tuple[str, ...] = ()
    """A key that may load and unload soft prompts too; also in FOREWORD_ADMIN_KEYS."""
    prompt_memory: int = 256
    """MB of soft prompts kept loaded; the longest unused make room."""
    max_queue: int = 512
    """Most texts and inputs worked on or waiting; beyond it requests are sent away with 503."""
    max_body: int = 4
    """Most MB of a request's body."""
    max_tokens: int = 4096
    """Most tokens a request may ask for."""
    max_texts: int = 128
    """Most texts of one request (prompts times n), or inputs to classify."""
    request_seconds: float = 300.0
    """Longest time of a request; then it is ended."""
    stall_seconds: float = 30.0
    """How long a client may leave its stream unread before it is given up."""
    grace: float = 30.0
    """Seconds that running requests have to finish when the server is stopped."""

    @property
    def open(self) -> bool:
        """Whether anybody on this machine may call everything: no key was given."""
        return not (self.api_keys or self.admin_keys)


def with_environment(settings: ServeSettings, environ: Mapping[str, str]) -> ServeSettings:
    """The settings with the keys of the environment's two variables beside their own."""

    def found(name: str) -> tuple[str, ...]:
        return tuple(key for part in environ.get(name, "").split(",") if (key := part.strip()))

    return replace(
        settings,
        api_keys=settings.api_keys + found(USER_KEYS),
        admin_keys=settings.admin_keys + found(ADMIN_KEYS),
    )


def check_settings(settings: ServeSettings) -> ServeSettings:
    """The same settings, refused where they contradict themselves or would serve everybody."""
    if not settings.model:
        raise ForewordError("no model given", "command line", "add --model: a hub id, a folder, smollm2-135m")
    if settings.engine not in ENGINES:
        fix = nearest(settings.engine, ENGINES) or f"one of {', '.join(ENGINES)}"
        raise ForewordError(f"no engine '{settings.engine}'", "--engine", fix)
    if settings.engine != "vllm" and (settings.vllm_url or settings.vllm_python):
        given = "--vllm-url" if settings.vllm_url else "--vllm-python"
        raise ForewordError(f"{given} says nothing to the engine '{settings.engine}'", given, "add --engine vllm")
    if settings.vllm_url and settings.vllm_python:
        raise ForewordError("a server to use and one to start", "--vllm-url, --vllm-python", "give one of them")
    if settings.engine == "vllm" and settings.device != "auto":
        raise ForewordError("vLLM's environment decides where it runs", "--device", "leave --device out")
    _check_keys(settings)
    return settings


def is_loopback(host: str) -> bool:
    """Whether a host name or address (brackets of IPv6 taken off) means this very machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_keys(settings: ServeSettings) -> None:
    if settings.open and not is_loopback(settings.host):
        raise ForewordError(
            f"without keys everybody who reaches {settings.host} could use this server",
            "--host",
            f"give keys in {USER_KEYS}, or leave --host out",
        )
    for key in settings.api_keys + settings.admin_keys:
        if not (key.isascii() and key.isprintable()) or " " in key or not key:
            raise ForewordError(
                "a key is empty or has other characters than letters, digits and signs",
                "--api-key, --admin-key",
                "make one with: openssl rand -hex 24",
            )
