"""Tiny random models of every family, and a real byte-level tokenizer, built on the spot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from foreword.backbone.load import Backbone, freeze
from foreword.backbone.source import quiet_loading
from foreword.config import PromptConfig
from foreword.prompts.methods.base import Start
from foreword.prompts.methods.prompt_tuning import PromptTuning
from foreword.records import Example, Segment

VOCAB = 320
HIDDEN = 32
CORPUS = [
    "Tweet text : my parcel is late and nobody answers Label : complaint",
    "Tweet text : thank you for the quick reply Label : no complaint",
    "Classify if the tweet is a complaint or no complaint: question praise neutral",
    "the quick brown fox jumps over the lazy dog and writes an invoice",
]
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
_MORE = {"intermediate_size": 64, "max_position_embeddings": 512}
WINDOW = 12

FAMILIES: dict[str, Any] = {
    "llama-gqa": lambda: tf.LlamaConfig(**_SIZES, **_MORE, num_key_value_heads=2),
    "gpt2": lambda: tf.GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=512, vocab_size=VOCAB),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**_SIZES, **_MORE),
    "bloom": lambda: tf.BloomConfig(hidden_size=HIDDEN, n_layer=2, n_head=4, vocab_size=VOCAB),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **_SIZES, **_MORE, num_key_value_heads=2, head_dim=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma2": lambda: tf.Gemma2Config(
        **_SIZES, **_MORE, num_key_value_heads=2, head_dim=16, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"], attn_implementation="eager",
    ),
    "mistral-window": lambda: tf.MistralConfig(**_SIZES, **_MORE, num_key_value_heads=2, sliding_window=WINDOW),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, **_MORE, num_key_value_heads=2, head_dim=16),
    "opt": lambda: tf.OPTConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, ffn_dim=64,
        max_position_embeddings=512, word_embed_proj_dim=HIDDEN, dropout=0.0,
    ),
    "gptj": lambda: tf.GPTJConfig(
        n_embd=HIDDEN, n_layer=2, n_head=4, rotary_dim=4, n_positions=512, vocab_size=VOCAB,
    ),
    "mamba": lambda: tf.MambaConfig(hidden_size=HIDDEN, num_hidden_layers=2, vocab_size=VOCAB, state_size=4),
}  # fmt: skip


@cache
def tokenizer() -> Any:
    """A byte-level BPE trained on a few lines, with pad == eos as in many real models."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 4,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")


def config(family: str) -> Any:
    """The family's configuration with our end token."""
    made = FAMILIES[family]()
    made.eos_token_id = made.pad_token_id = made.bos_token_id = 0
    return made


def backbone(family: str = "llama-gqa", dtype: torch.dtype = torch.float64, seed: int = 0) -> Backbone:
    """A tiny frozen backbone; weights large enough that results differ clearly."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config(family))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.25)
    return Backbone(freeze(model).to(dtype), tokenizer(), f"tiny-{family}")


def save(folder: Path, family: str = "llama-gqa", seed: int = 0) -> Path:
    """The same model and tokenizer as a folder that ``from_pretrained`` loads."""
    made = backbone(family, torch.float32, seed)
    with quiet_loading():
        made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def soft(values: torch.Tensor) -> PromptTuning:
    """Prompt tuning that starts from rows ``[P, H]``."""
    return PromptTuning(Start(values), PromptConfig(), torch.Generator())


def front(contexts: Iterable[Sequence[int]], virtual_tokens: int) -> list[tuple[int, ...]]:
    """Contexts with virtual ids in front."""
    return [(*range(VOCAB, VOCAB + virtual_tokens), *c) for c in contexts]


def in_front(examples: Iterable[Example], virtual_tokens: int) -> list[Segment]:
    """Training rows with virtual ids in front."""
    return [Segment(c, (e.target,)) for e in examples for c in front([e.context], virtual_tokens)]
