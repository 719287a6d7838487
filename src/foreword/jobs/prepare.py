"""From a task and a backbone to token ids, a layout and the first rows of a soft prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from foreword.artifact.folder import Adapter, read_adapter
from foreword.artifact.hub import locate
from foreword.backbone.attach import compiled
from foreword.backbone.load import Backbone
from foreword.config import Member, PromptConfig, several
from foreword.data.encode import Encoder
from foreword.data.template import parse
from foreword.errors import ForewordError
from foreword.jobs.fewshot import FewShot, shown_in
from foreword.jobs.match import check_backbone, refuse_several_tasks
from foreword.prompts import initialisers as init
from foreword.prompts.initialisers import parse_init
from foreword.prompts.methods.base import Method, Start
from foreword.prompts.methods.context_tuning import own_tokens
from foreword.prompts.methods.registry import METHODS, build
from foreword.prompts.soft import Kind
from foreword.records import Example, Task

Beginnings = tuple[list[Method], list[tuple[int, ...]]]
"""What members train: soft prompts before the first step, and the indices of the rows that each shows, if any."""


def make_encoder(task: Task, backbone: Backbone, tokens: int, kind: Kind = "rows", first: int = 0) -> Encoder:
    """The encoder whose rows fit the backbone's window beside ``tokens`` virtual ones.

    Rows of a soft prompt stand in the contexts as virtual ids from ``V + first``; a prefix does not.
    """
    limit = room_for_text(backbone.window, tokens, backbone.name)
    start = backbone.vocab_size + first
    virtual = range(start, start + tokens) if kind == "rows" else ()
    return Encoder(task, backbone.tokenizer, limit, backbone.end_id, virtual)


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


def settle_tokens(config: PromptConfig, task: Task, backbone: Backbone) -> PromptConfig:
    """The prompt's configuration with its number of virtual tokens: the template's, the given one, or the source's."""
    placed = parse(task.template).soft_tokens
    if placed:
        return replace(config, virtual_tokens=placed)
    if METHODS[config.method].shows_rows and config.virtual_tokens in (0, PromptConfig().virtual_tokens):
        return replace(config, virtual_tokens=own_tokens(backbone.window))
    if config.virtual_tokens or config.method == "cpt":  # whose tokens are its examples'
        return config
    names = {name for init in several(config.init) for name, _ in parse_init(init, 0)}
    if names == {"adapter"}:
        return replace(config, virtual_tokens=_adapter(config, backbone).prompt.tokens)
    if names == {"text"}:
        return replace(config, virtual_tokens=len(_text_ids(config, task, backbone)))
    raise ForewordError(
        f"nothing says how many virtual tokens init={config.init} has",
        "key prompt.virtual_tokens",
        "give their number; only init=text and init=adapter bring one",
    )


def first_method(
    config: PromptConfig, task: Task, encoder: Encoder, backbone: Backbone, member: Member, examples: FewShot | None
) -> Method:
    """A member's soft prompt before its first step, by its initialiser, from a generator of its seed.

    Args:
        config: with its number of virtual tokens.
        task: what is learnt.
        encoder: of the task.
        backbone: the model.
        member: initialiser and seed.
        examples: rows to start from (cpt, context-tuning).
    """
    generator = torch.Generator().manual_seed(member.seed)
    kind = METHODS[config.method].kind
    if examples is not None:
        rows = embedded(backbone, examples.ids)
        values = compiled(backbone, rows) if kind == "prefix" else rows
        return build(Start(values, token_ids=examples.ids, token_types=examples.types), config, generator)
    adapter = _adapter(config, backbone) if member.init == "adapter" else None
    if kind == "prefix" and member.init == "zero":
        return build(Start(torch.zeros(config.virtual_tokens, backbone.geometry.width)), config, generator)
    if adapter is not None and adapter.prompt.kind == kind == "prefix":
        values = init.from_prefix(adapter.prompt.values, config.virtual_tokens)
        return build(Start(values), config, generator)
    if adapter is not None and config.method == "multitask" and "prefix_task_cols" in adapter.tensors:
        tensors = adapter.tensors
        if adapter.prompt.tokens != config.virtual_tokens:
            raise ForewordError(
                f"the adapter has {adapter.prompt.tokens} virtual tokens, not {config.virtual_tokens}",
                "key prompt.virtual_tokens",
                "prompt.virtual_tokens=0 takes as many as it has",
            )
        factors = (tensors["prefix_task_cols"].float(), tensors["prefix_task_rows"].float())
        return build(Start(tensors["prompt_embeddings"].float(), factors=factors), config, generator)
    rows = _first_rows(config, task, encoder, backbone, member.init, generator)
    return build(Start(compiled(backbone, rows) if kind == "prefix" else rows), config, generator)


def beginnings(
    config: PromptConfig, task: Task, encoder: Encoder, backbone: Backbone, members: Sequence[Member],
    examples: Sequence[Example], few_shot: FewShot | None = None,
) -> Beginnings:  # fmt: skip
    """What members train: their soft prompts before the first step, and the indices of the rows these show.

    Args:
        config: with its number of virtual tokens.
        task: what is learnt.
        encoder: of the task.
        backbone: the model.
        members: initialisers and seeds.
        examples: the rows they train on.
        few_shot: rows that all start from (cpt).

    Raises:
        ForewordError: there are too few rows to show some and train on others.
    """
    shown = [few_shot] * len(members)
    if shows := METHODS[config.method].shows_rows:
        if len(examples) < 2:
            what = f"{config.method} shows some rows and trains on others: it needs two, not {len(examples)}"
            raise ForewordError(what, "key prompt.method", "give more rows, or prompt.method=prefix-tuning")
        shown = [shown_in(encoder, examples, config.virtual_tokens, m.seed) for m in members]
    methods = [first_method(config, task, encoder, backbone, m, f) for m, f in zip(members, shown, strict=True)]
    return methods, [f.rows for f in shown if f is not None] if shows else []


def _first_rows(
    config: PromptConfig, task: Task, encoder: Encoder, backbone: Backbone, name: str, generator: torch.Generator
) -> torch.Tensor:
    """Rows ``[P, H]`` of an initialiser."""
    special = list(backbone.tokenizer.all_special_ids)

    def embed(ids: Sequence[int]) -> torch.Tensor:
        return embedded(backbone, ids)

    def frequent() -> list[int]:
        found = init.frequent_ids(backbone.tokenizer.get_vocab(), special, backbone.vocab_size)
        return found or [i for i in range(backbone.vocab_size) if i not in special]

    def make(name: str) -> init.Initialiser:
        if name == "text":
            return init.from_text(_text_ids(config, task, backbone), embed)
        if name == "classes":
            return init.from_class_words([ids[:-1] for ids in encoder.label_ids], embed)
        if name == "vocabulary":
            return init.from_vocabulary(frequent(), embed, generator)
        if name == "random":
            return init.from_random(embed(frequent()[:512]), generator)
        if name == "adapter":
            return init.from_rows(_adapter_rows(config, backbone))
        if name == "zero":
            raise ForewordError("rows of zeros are no start", "prompt.init=zero", "it is for prefix-tuning alone")
        return init.peft_random(backbone.hidden_size, generator)

    parts = [(make(name), size) for name, size in parse_init(name, config.virtual_tokens)]
    return init.compose(parts)(config.virtual_tokens)


def embedded(backbone: Backbone, ids: Sequence[int]) -> torch.Tensor:
    """Embeddings ``[n, H]`` as the model reads them, float32."""
    with torch.no_grad():
        rows: torch.Tensor = backbone.embedding(torch.tensor(list(ids), device=backbone.device))
        return rows.float().cpu()


def _text_ids(config: PromptConfig, task: Task, backbone: Backbone) -> list[int]:
    ids: list[int] = backbone.tokenizer(config.init_text or instruction(task))["input_ids"]
    return ids


def _adapter(config: PromptConfig, backbone: Backbone) -> Adapter:
    source = config.init_adapter
    if not source:
        raise ForewordError("no adapter given to start from", "key prompt.init_adapter", "name a folder or hub id")
    adapter = read_adapter(locate(source))
    if config.method != "multitask":
        refuse_several_tasks(adapter)
    check_backbone(adapter, backbone)
    return adapter


def _adapter_rows(config: PromptConfig, backbone: Backbone) -> torch.Tensor:
    prompt = _adapter(config, backbone).prompt
    if prompt.kind != "rows":
        raise ForewordError(
            "a prefix of keys and values cannot become rows at the embedding",
            f"prompt.init_adapter={config.init_adapter}",
            "prompt.method=prefix-tuning",
        )
    return prompt.values


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
