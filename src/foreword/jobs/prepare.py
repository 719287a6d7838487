"""From a task and a backbone to token ids, a layout and the first rows of a soft prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from foreword.artifact.folder import read_adapter
from foreword.artifact.hub import locate
from foreword.backbone.load import Backbone
from foreword.config import PromptConfig
from foreword.data.encode import Encoder
from foreword.data.template import parse
from foreword.errors import ForewordError
from foreword.prompts import initialisers as init
from foreword.records import Task


def make_encoder(task: Task, backbone: Backbone, virtual_tokens: int) -> Encoder:
    """The encoder whose rows fit the backbone's window beside ``virtual_tokens``."""
    limit = room_for_text(backbone.window, virtual_tokens, backbone.name)
    return Encoder(task, backbone.tokenizer, limit, backbone.end_id)


def room_for_text(window: int, virtual_tokens: int, name: str) -> int:
    """Tokens the window leaves beside the virtual ones; refuses when there is none to speak of."""
    if window - virtual_tokens < 2:
        raise ForewordError(
            f"{virtual_tokens} virtual tokens leave no room for text",
            f"{name} reads {window} tokens",
            f"set prompt.virtual_tokens below {window - 1}",
        )
    return window - virtual_tokens


def instruction(task: Task) -> str:
    """The text a soft prompt starts from when none is given: the task in one plain sentence."""
    columns = " and ".join(f.column for f in parse(task.template).fields)
    if not task.classifies:
        return f"Read the {columns} and write the {task.label_column}:"
    head, tail = list(task.words[:-1]), task.words[-1]
    return f"Classify if the {columns} is {', '.join(head)} or {tail}:"


def initial_rows(
    config: PromptConfig, task: Task, encoder: Encoder, backbone: Backbone, init_name: str, seed: int
) -> torch.Tensor:
    """The first rows ``[P, H]`` of a member, by its initialiser, from a generator of its seed."""
    generator = torch.Generator().manual_seed(seed)
    special = list(backbone.tokenizer.all_special_ids)

    def embed(ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            rows: torch.Tensor = backbone.embedding(torch.tensor(list(ids), device=backbone.device))
            return rows.float().cpu()

    def frequent() -> list[int]:
        found = init.frequent_ids(backbone.tokenizer.get_vocab(), special, backbone.vocab_size)
        return found or [i for i in range(backbone.vocab_size) if i not in special]

    def make(name: str) -> init.Initialiser:
        if name == "text":
            text = config.init_text or instruction(task)
            return init.from_text(backbone.tokenizer(text)["input_ids"], embed)
        if name == "classes":
            return init.from_class_words([ids[:-1] for ids in encoder.label_ids], embed)
        if name == "vocabulary":
            return init.from_vocabulary(frequent(), embed, generator)
        if name == "random":
            return init.from_random(embed(frequent()[:512]), generator)
        if name == "adapter":
            return init.from_rows(_adapter_rows(config.init_adapter, backbone))
        return init.peft_random(backbone.hidden_size, generator)

    parts = [(make(name), size) for name, size in init.parse_init(init_name, config.virtual_tokens)]
    return init.compose(parts)(config.virtual_tokens)


def _adapter_rows(source: str, backbone: Backbone) -> torch.Tensor:
    if not source:
        raise ForewordError("no adapter given to start from", "key prompt.init_adapter", "name a folder or hub id")
    rows = read_adapter(locate(source)).rows
    if rows.shape[1] != backbone.hidden_size:
        raise ForewordError(
            f"the adapter's width is {rows.shape[1]}, the backbone's {backbone.hidden_size}",
            f"prompt.init_adapter={source}, model {backbone.name}",
            "start from an adapter of the same backbone",
        )
    return rows


@contextmanager
def memory_explained(knob: str) -> Iterator[None]:
    """Says which knob helps when memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise _out_of_memory(e, knob) from None
    except RuntimeError as e:
        if "can't allocate memory" not in str(e) and "out of memory" not in str(e):
            raise
        raise _out_of_memory(e, knob) from None


def _out_of_memory(error: BaseException, knob: str) -> ForewordError:
    first = (str(error).splitlines() or ["no details"])[0][:200]
    return ForewordError("out of memory", first, knob)
