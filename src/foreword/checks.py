"""What a recipe may not say: values out of range and keys that contradict each other."""

from __future__ import annotations

import math
from pathlib import Path

from foreword.config import DataConfig, PromptConfig, Recipe, TuneConfig, members, value_of
from foreword.data.template import parse
from foreword.errors import ForewordError

FILES = (".csv", ".jsonl", ".parquet")
"""Suffixes of data files."""
REQUIRED = {
    "model.id": ("no model given", "add --model ID (or model.id=ID)"),
    "data.path": ("no training data given", "add --data FILE (or data.path=FILE)"),
    "data.label": ("no label column given", "add --label COLUMN"),
}
COUNTS = (
    "prompt.rank",
    "prompt.population",
    "train.batch_size",
    "train.accumulate",
    "train.validate_every",
)
NOT_NEGATIVE = (
    "prompt.virtual_tokens",
    "prompt.encoder_size",
    "prompt.frozen_tokens",
    "prompt.epsilon",
    "prompt.format_epsilon",
    "prompt.loss_decay",
    "train.epochs",
    "train.warmup_steps",
    "train.clip",
    "train.weight_decay",
    "train.token_budget",
    "train.checkpoint_every",
    "train.patience",
    "data.max_length",
)
FRACTIONS = ("data.eval_fraction", "data.validation_fraction")
CHOICES = {
    "data.task": ("auto", "classify", "generate"),
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.attention": ("auto", "sdpa", "eager", "flex_attention"),
    "model.quantize": ("none", "nf4", "int8", "int8-weight", "float8-weight", "int8-dynamic"),
    "prompt.placement": ("front", "after-bos", "end"),
    "prompt.encoder": ("mlp", "lstm"),
    "train.select": ("last", "loss", "accuracy", "macro_f1"),
    "train.autocast": ("auto", "on", "off"),
    "train.engine": ("auto", "eager", "graph", "compile"),
    "tune.sampler": ("list", "optuna"),
    "tune.wording": ("auto", "given"),
    "tune.biases": ("auto", "never"),
    "tune.untrained": ("auto", "never"),
}


def check(recipe: Recipe) -> None:
    """Refuses values and combinations that cannot work, by key, before anything is loaded."""
    _check_given(recipe)
    _check_numbers(recipe)
    _check_choices(recipe)
    _check_held_out(recipe.data)
    _check_selection(recipe)
    _check_method(recipe)


def check_distill(recipe: Recipe) -> None:
    """Refuses what ``foreword distill`` cannot work with, before anything is loaded."""
    given = recipe.distill
    _need(bool(recipe.model.id), "model.id", *REQUIRED["model.id"])
    _need(
        bool(given.text) != bool(given.few_shot),
        "distill.text",
        "a text and few-shot examples exclude each other" if given.text else "nothing to distil is given",
        "add --text FILE, or --few-shot TOKENS with --data",
    )
    needs_rows = "few-shot examples need labelled rows"
    _need(not given.few_shot or bool(recipe.data.path), "distill.few_shot", needs_rows, "add --data FILE")
    for method in ("cpt", "context-tuning"):
        what = f"{method} starts from rows, not from a text"
        _need(recipe.prompt.method != method, "prompt.method", what, "leave it out")
    _need(recipe.prompt.method != "multitask", "prompt.method", "multitask is for several tasks", "leave it out")
    _need(recipe.prompt.virtual_tokens > 0, "prompt.virtual_tokens", "a text is longer than its soft prompt", "give it")
    only_last = "the student follows its teacher and is not chosen by labels"
    _need(recipe.train.select == "last", "train.select", only_last, "leave train.select out")
    for key in ("data.folds", "data.validation_fraction"):
        _need(not value_of(recipe, key), key, f"a distillation has no {key}", "data.eval_fraction=0.2")
    default = PromptConfig()
    for key in ("prompt.placement", "prompt.init", "prompt.init_text", "prompt.init_adapter"):
        same = value_of(recipe, key) == getattr(default, key.removeprefix("prompt."))
        _need(same, key, "a distilled soft prompt starts as its text, in front of everything", f"leave {key} out")
    placed = parse(recipe.data.template).soft_tokens if recipe.data.template else 0
    _need(not placed, "data.template", "a distilled soft prompt stands in front of everything", "leave {soft:N} out")
    for key in ("distill.queries", "distill.answer_tokens", "distill.candidates"):
        value = value_of(recipe, key)
        _need(value >= 2, key, f"{key} must be more than 1, not {value}", f"set {key} to 2 or more")
    _check_numbers(recipe)
    _check_choices(recipe)
    _check_method(recipe)


SEARCHED = {
    "prompt.method": "tune.methods", "prompt.init": "tune.inits", "prompt.virtual_tokens": "tune.virtual_tokens",
    "train.lr": "tune.lr_factors", "train.seed": "tune.seed", "prompt.population": "tune.members",
}  # fmt: skip
"""What a search chooses, and the key that says among what."""


def check_tune(recipe: Recipe) -> None:
    """Refuses what ``foreword tune`` cannot work with, beside what ``check`` refuses."""
    tune, default = recipe.tune, Recipe(tune=recipe.tune)
    for key, instead in SEARCHED.items():
        same = value_of(recipe, key) == value_of(default, key)
        _need(same, key, f"tune chooses {key} itself", f"leave it out, or narrow {instead}")
    for key in ("data.folds", "data.validation_fraction", "train.select"):
        same = value_of(recipe, key) == value_of(default, key)
        _need(same, key, f"tune cross-validates by itself: {key} has no part in it", f"leave {key} out")
    for key in ("tune.methods", "tune.inits", "tune.virtual_tokens", "tune.lr_factors"):
        value = value_of(recipe, key)
        _need(bool(value) and len(set(value)) == len(value), key, f"{key} is {list(value)}", "list different values")
    for method in tune.methods:
        _need(method not in ("cpt", "multitask"), "tune.methods", f"{method} has a start of its own", "leave it out")
    _need(min(tune.virtual_tokens) >= 1, "tune.virtual_tokens", "a soft prompt has tokens", "give 1 or more")
    _need(0 < min(tune.lr_factors) < math.inf, "tune.lr_factors", "factors are more than 0", "such as [1, 3, 0.3]")
    _need(tune.ray_workers >= 0, "tune.ray_workers", f"{tune.ray_workers} workers", "give 0 or more")
    _need(not (tune.ray and recipe.train.parallel), "tune.ray", "trainings are on Ray or spread, not both", "keep one")
    _need(tune.rows >= tune.folds, "tune.rows", f"{tune.rows} rows cannot be parted in {tune.folds}", "tune.rows=512")
    _need(tune.folds >= 2, "tune.folds", f"{tune.folds} folds leave nothing out", "tune.folds=3")
    _need(0 <= tune.balance <= 1, "tune.balance", f"{tune.balance:g} is no share", "from 0 (rows) to 1 (classes)")
    _need(tune.members >= 1, "tune.members", f"an ensemble of {tune.members}", "tune.members=1 is a single one")
    limits = [x for x in (tune.minutes, tune.trainings) if x]
    _need(len(limits) == 1 and 0 < limits[0] < math.inf, "tune.minutes", "the budget is minutes or trainings",
          "tune.minutes=45, or tune.minutes=0 tune.trainings=12")  # fmt: skip


def check_no_tune(recipe: Recipe) -> None:
    """Refuses keys of the ``tune`` section where nothing is searched."""
    _need(recipe.tune == TuneConfig(), "tune.*", "tune keys mean nothing here", "use foreword tune")


def _check_given(recipe: Recipe) -> None:
    for key, (what, fix) in REQUIRED.items():
        _need(bool(value_of(recipe, key)), key, what, fix)
    data = recipe.data
    _need(bool(data.text or data.template), "data.text", "no input column given", "add --text COLUMN or --template")


def _check_numbers(recipe: Recipe) -> None:
    """Ranges. Written so that NaN, which compares false with everything, is refused too."""
    folds = recipe.data.folds
    for lr in {m.lr for m in members(recipe)}:
        _need(0 <= lr < math.inf, "train.lr", f"train.lr must not be negative, not {lr}", "for example train.lr=0.03")
    for key in COUNTS:
        value = value_of(recipe, key)
        _need(value >= 1, key, f"{key} must be more than 0, not {value}", f"set {key} to 1 or more")
    for key in NOT_NEGATIVE:
        value = value_of(recipe, key)
        _need(0 <= value < math.inf, key, f"{key} must not be negative, not {value}", f"set {key} to 0 or more")
    for key in FRACTIONS:
        value = value_of(recipe, key)
        _need(0 <= value < 1, key, f"{key} must lie in [0, 1), not {value}", f"for example {key}=0.2")
    minutes = recipe.train.collective_minutes
    what = f"processes cannot wait {minutes} minutes for each other"
    _need(0 < minutes < math.inf, "train.collective_minutes", what, "train.collective_minutes=10")
    _need(folds == 0 or folds >= 2, "data.folds", f"data.folds must be 0 or at least 2, not {folds}", "data.folds=5")


def _check_choices(recipe: Recipe) -> None:
    for key, known in CHOICES.items():
        value = value_of(recipe, key)
        _need(value in known, key, f"{key} is '{value}'", f"choose one of {', '.join(known)}")


def _check_held_out(data: DataConfig) -> None:
    """One way to hold rows out, and never the training rows themselves by accident."""
    ways = {
        "data.eval_path / data.eval_split": bool(data.eval_path or data.eval_split),
        "data.eval_fraction": data.eval_fraction > 0,
        "data.folds": data.folds > 0,
    }
    given = [key for key, on in ways.items() if on]
    _need(len(given) < 2, given[0] if given else "", f"{' and '.join(given)} exclude each other", "keep one of them")
    _need(
        not data.eval_split or bool(data.eval_path) or Path(data.path).suffix.lower() not in FILES,
        "data.eval_split",
        f"{data.path} is one file and has no split '{data.eval_split}'",
        "add --eval-data FILE, or data.eval_fraction=0.2",
    )


def _check_selection(recipe: Recipe) -> None:
    data, train = recipe.data, recipe.train
    _need(
        not (train.recompute and train.engine == "compile"),
        "train.recompute",
        "train.recompute and train.engine=compile exclude each other",
        "train.engine=auto",
    )
    _need(
        recipe.prompt.population == 1 or not isinstance(train.seed, tuple),
        "prompt.population",
        "prompt.population and a list in train.seed exclude each other",
        "keep the list, or one seed to count up from",
    )
    _need(
        train.select == "last" or data.validation_fraction > 0,
        "train.select",
        f"train.select={train.select} needs validation rows",
        "add data.validation_fraction=0.2 (the held-out rows are never used to choose)",
    )
    _need(
        train.patience == 0 or train.select != "last",
        "train.patience",
        "train.patience needs a score to watch",
        "add train.select=loss and data.validation_fraction=0.2",
    )


def _check_method(recipe: Recipe) -> None:
    """What cannot stand where, or together."""
    prompt, template = recipe.prompt, recipe.data.template
    placed = parse(template).soft_tokens if template else 0
    _need(
        not placed or prompt.placement == "front",
        "prompt.placement",
        "the template says where the virtual tokens stand, and prompt.placement says it too",
        "keep one of them",
    )
    elsewhere = bool(placed) or prompt.placement != "front"
    if prompt.method in ("prefix-tuning", "context-tuning", "cartridge"):
        what = f"{prompt.method} stands in the cache before everything and cannot be placed in the text"
        _need(not elsewhere, "prompt.placement", what, "prompt.method=prompt-tuning")
    if prompt.method in ("cpt", "context-tuning"):
        several_inits = f"{prompt.method} starts from training rows and takes no other initialiser"
        _need(prompt.init == PromptConfig().init, "prompt.init", several_inits, "leave prompt.init out")
    if prompt.method == "cpt":
        _need(not elsewhere, "prompt.placement", "cpt reads its examples before everything", "prompt.placement=front")
        read_twice = "rows held out of a fold would be read as cpt's examples"
        _need(not recipe.data.folds, "data.folds", read_twice, "data.eval_fraction=0.2")
    default = PromptConfig().virtual_tokens
    _need(
        not placed or prompt.virtual_tokens in (0, default, placed),
        "prompt.virtual_tokens",
        f"the template places {placed} virtual tokens, prompt.virtual_tokens={prompt.virtual_tokens}",
        "leave prompt.virtual_tokens out",
    )


def _need(ok: bool, key: str, what: str, fix: str) -> None:
    if not ok:
        raise ForewordError(what, f"key {key}", fix)
