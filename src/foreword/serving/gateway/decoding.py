"""From a request's fields to how tokens are chosen, refusing what the engine would not heed."""

from __future__ import annotations

from typing import Any

from foreword.serving.engine import Capabilities, Decoding
from foreword.serving.gateway.errors import refused
from foreword.serving.gateway.schema import Generation
from foreword.serving.settings import ServeSettings

TEMPERATURE = 1.0
"""OpenAI's, where a request gives none."""
_FIELDS = (
    "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "ignore_eos",
)  # fmt: skip
_NAMES = {"stop_ids": "stop_token_ids", "top_logprobs": "logprobs"}


def decoding_of(body: Generation, top_logprobs: int | None, known: Capabilities) -> Decoding:
    """How the tokens of this request are chosen; ``max_tokens`` is set for each context.

    Args:
        body: of the request.
        top_logprobs: alternatives asked for; None: no log-probabilities.
        known: what the engine can do.

    Raises:
        ApiError: it asks for what this engine does not do, or for tokens there are not.
    """
    given: dict[str, Any] = {name: value for name in _FIELDS if (value := getattr(body, name)) is not None}
    usual = TEMPERATURE if "temperature" in known.samples else 0.0
    given["temperature"] = usual if body.temperature is None else body.temperature
    given["top_k"] = max(body.top_k or 0, 0)
    given["logit_bias"] = {int(k): v for k, v in (body.logit_bias or {}).items()}
    given["stop_ids"] = tuple(body.stop_token_ids or ())
    given["top_logprobs"] = top_logprobs
    decoding = Decoding(**given)
    _check(decoding, known)
    return decoding


def _check(decoding: Decoding, known: Capabilities) -> None:
    plain = Decoding()
    for name in given_fields(decoding, plain):
        if name not in known.samples:
            raise refused(
                f"the engine '{known.engine}' does not heed '{_NAMES.get(name, name)}'", _NAMES.get(name, name)
            )
    if (decoding.top_logprobs or 0) > known.max_top_logprobs:
        raise refused(f"at most {known.max_top_logprobs} alternatives a token", "logprobs")
    if any(i >= known.vocab_size for i in (*decoding.logit_bias, *decoding.stop_ids)):
        raise refused(
            f"token ids must be below {known.vocab_size}", "logit_bias" if decoding.logit_bias else "stop_token_ids"
        )


def given_fields(decoding: Decoding, plain: Decoding) -> list[str]:
    """Fields that differ from the plain way, apart from how many tokens there may be."""
    return [n for n in vars(plain) if n != "max_tokens" and getattr(decoding, n) != getattr(plain, n)]


def texts_of(body: Generation, prompts: int, settings: ServeSettings) -> int:
    """Texts of each prompt; refused where a request would have more in all than the server writes at once."""
    n = body.n or 1
    if prompts * n > settings.max_texts:
        raise refused(f"{prompts * n} texts in one request; at most {settings.max_texts}", "n")
    return n


def most_tokens(given: int | None, field: str, settings: ServeSettings) -> int | None:
    """How many tokens were asked for, if any number was."""
    if given is not None and given > settings.max_tokens:
        raise refused(f"{given} tokens asked for; at most {settings.max_tokens}", field)
    return given


def stops_of(body: Generation) -> tuple[str, ...]:
    """The stop strings."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
