"""``GET /v1/models``: the plain model and the soft prompts, as OpenAI's clients list them."""

from __future__ import annotations

from bisect import bisect_right

from starlette.requests import Request
from starlette.responses import Response

from foreword.serving.engine import EngineDown
from foreword.serving.gateway.errors import refused
from foreword.serving.gateway.replies import MemberCard, ModelCard, ModelList, PromptCard
from foreword.serving.gateway.service import Gateway
from foreword.serving.registry import Card, Loaded

MOST = 1_000_000


async def list_models(gateway: Gateway, request: Request) -> Response:
    """All names, sorted behind the plain model's; ``?limit=`` of them from behind the name ``?after=``."""
    limit, after = _limit(request.query_params.get("limit")), request.query_params.get("after", "")
    cards = gateway.registry.cards()
    plain = [] if after else [base_card(gateway)]
    start = 0 if after in ("", gateway.base.name) else bisect_right(cards, after, key=lambda card: card.name)
    end = start + limit - len(plain)
    data = [*plain, *(_card(gateway, card) for card in cards[start:end])]
    return _reply(ModelList(object="list", data=data, has_more=end < len(cards)))


async def one_model(gateway: Gateway, request: Request) -> Response:
    """One of them with all there is to know, for which a soft prompt is loaded."""
    name = request.path_params["id"]
    try:
        async with gateway.target(name) as target:
            found = loaded_card(gateway, target.loaded) if target.loaded else base_card(gateway)
    except EngineDown:
        found = _card(gateway, await gateway.registry.card(name))
    return _reply(found)


def base_card(gateway: Gateway) -> ModelCard:
    """The plain model's."""
    known = gateway.base.capabilities
    return ModelCard(
        id=gateway.base.name,
        object="model",
        created=0,
        owned_by="foreword",
        root=gateway.base.name,
        parent=None,
        max_model_len=known.window,
    )


def loaded_card(gateway: Gateway, loaded: Loaded) -> ModelCard:
    """A loaded soft prompt's, with its task."""
    reader, task = loaded.members[0].reader, loaded.task
    tokens = max(m.tokens for m in loaded.members)
    prompt = PromptCard(
        loaded=True,
        revision=loaded.revision,
        kind=loaded.members[0].kind,
        tokens=tokens,
        nbytes=loaded.nbytes,
        classes=list(reader.classes),
        columns=list(reader.columns),
        template=task.template if task else None,
        members=[MemberCard(kind=m.kind, tokens=m.tokens, nbytes=m.nbytes) for m in loaded.members],
    )
    return _named(gateway, loaded.name, loaded.created, tokens, prompt)


def _card(gateway: Gateway, card: Card) -> ModelCard:
    if not card.loaded:
        return _named(gateway, card.name, card.created, None, PromptCard(loaded=False))
    classes = None if card.classes is None else list(card.classes)
    prompt = PromptCard(
        loaded=True,
        revision=card.revision,
        kind=card.kind,
        tokens=card.tokens,
        nbytes=card.nbytes,
        classes=classes,
    )
    return _named(gateway, card.name, card.created, card.tokens, prompt)


def _named(gateway: Gateway, name: str, created: int, tokens: int | None, prompt: PromptCard) -> ModelCard:
    base = gateway.base.name
    return ModelCard(
        id=name,
        object="model",
        created=created,
        owned_by="foreword",
        root=name,
        parent=base,
        max_model_len=None if tokens is None else gateway.base.capabilities.window - tokens,
        soft_prompt=prompt,
    )


def _reply(content: ModelCard | ModelList) -> Response:
    return Response(content.model_dump_json(exclude_unset=True), media_type="application/json")


def _limit(given: str | None) -> int:
    if given is None:
        return MOST
    if not (given.isascii() and given.isdigit()) or not 1 <= int(given[:9]) <= MOST:
        raise refused(f"'limit' is a number from 1 to {MOST}", "limit")
    return int(given)
