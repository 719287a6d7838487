"""A tiny random model of a shape that vLLM's CPU build takes: heads of 32 numbers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf

import tiny
from foreword.backbone.load import Backbone, freeze
from foreword.backbone.source import quiet_loading

HIDDEN = 64


def backbone(seed: int = 0) -> Backbone:
    """A Llama of two layers in float32, its results far apart."""
    config = tf.LlamaConfig(
        hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        vocab_size=tiny.VOCAB, intermediate_size=64, max_position_embeddings=512,
        eos_token_id=0, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.25)
    return Backbone(freeze(model).float(), tiny.tokenizer(), "tiny-vllm")


def save(folder: Path, seed: int = 0) -> Path:
    """The same model and tokenizer as a folder."""
    made = backbone(seed)
    with quiet_loading():
        made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder
