"""What ``foreword tune`` tries with a backbone: the lists of the recipe, for the methods that work there."""

from __future__ import annotations

from dataclasses import replace

from foreword.checks import check
from foreword.config import Recipe
from foreword.errors import ForewordError
from foreword.jobs.candidates import Workshop
from foreword.jobs.training import say
from foreword.prompts.methods.context_tuning import own_tokens
from foreword.prompts.methods.registry import EXAMPLES, find
from foreword.tuning.space import Candidate, Known, Listed, Optuna, Sampler, candidates


def proposals(recipe: Recipe, workshop: Workshop) -> tuple[Sampler, int, Candidate]:
    """What proposes candidates, of the methods that this backbone can do; how many there are; the first.

    Raises:
        ForewordError: no method of the list works.
    """
    config = recipe.tune
    known = {m: _known(recipe, workshop, m) for m in config.methods}
    config = replace(config, inits=tuple(dict.fromkeys(_sized(recipe, workshop, i) for i in config.inits)))
    able = tuple(
        m for m in config.methods if _works(recipe, workshop, candidates(replace(config, methods=(m,)), known)[0])
    )
    if not able:
        raise ForewordError("no method of the list works with this backbone", "key tune.methods", "give others")
    config = replace(config, methods=able)
    space = candidates(config, known)
    if config.sampler == "optuna":
        return Optuna(config, known, config.seed), max(len(space), 4 * len(able)), space[0]
    return Listed(config, known), len(space), space[0]


def _known(recipe: Recipe, workshop: Workshop, method: str) -> Known:
    """What a method says itself."""
    found = find(method)
    rate = found.rate(recipe.prompt)
    return Known(rate, EXAMPLES, own_tokens(workshop.backbone.window)) if found.shows_rows else Known(rate)


def _sized(recipe: Recipe, workshop: Workshop, init: str) -> str:
    """``+classes`` without a number takes a row a class, as far as half of the smallest soft prompt goes.

    Free text has no classes: there it is left out.
    """
    if "+" not in init or not init.endswith("classes"):
        return init
    if not workshop.splits.task.classifies:
        return init.removesuffix("+classes")
    room = max(1, min(recipe.tune.virtual_tokens) // 2)
    return f"{init}:{max(1, min(len(workshop.splits.task.classes), room))}"


def _works(recipe: Recipe, workshop: Workshop, candidate: Candidate) -> bool:
    try:
        check(replace(recipe, prompt=workshop.ready(candidate).prompt))
        workshop.method(candidate, 0)
    except ForewordError as e:
        if len(recipe.tune.methods) == 1:
            raise
        say(workshop.console, f"{candidate.method} is left out: {e.what}")
        return False
    return True
