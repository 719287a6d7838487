"""``POST /v1/completions``: texts, token ids or columns to go on from."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from starlette.types import ASGIApp

from foreword.serving.gateway.answer import answer, with_usage
from foreword.serving.gateway.decoding import decoding_of, most_tokens, stops_of, texts_of
from foreword.serving.gateway.errors import refused
from foreword.serving.gateway.logprobs import Vocabulary
from foreword.serving.gateway.logs import Call
from foreword.serving.gateway.replies import Completion, TextChoice, TextLogprobs, Usage
from foreword.serving.gateway.schema import CompletionRequest
from foreword.serving.gateway.service import Gateway, Ids, Writer
from foreword.serving.gateway.texts import Order, Piece, Row, Tally

MOST_TOKENS = 16
"""Of a text whose request does not say; OpenAI's number."""


async def completions(gateway: Gateway, body: CompletionRequest, call: Call) -> ASGIApp:
    """Answers, whole or as a stream."""
    return await answer(gateway, body, order_of(gateway, body), CompletionReply(body, gateway.vocabulary), call)


def order_of(gateway: Gateway, body: CompletionRequest) -> Order:
    """What the request wants written."""
    texts, contexts = inputs(body)
    most = most_tokens(body.max_tokens, "max_tokens", gateway.settings)
    return Order(
        model=body.model,
        texts=texts,
        contexts=contexts,
        count=len(texts),
        n=texts_of(body, len(texts), gateway.settings),
        stops=stops_of(body),
        decoding=decoding_of(body, body.logprobs, gateway.base.capabilities),
        max_tokens=MOST_TOKENS if most is None else most,
    )


def inputs(body: CompletionRequest) -> tuple[Sequence[str], Callable[[Writer], list[Ids]]]:
    """The texts that will be read (empty ones for token ids), and how to read all of them for a soft prompt."""
    prompt, columns = body.prompt, body.columns
    if columns is not None and prompt is None:
        return ["".join(map(str, columns.values()))], lambda writer: [writer.row(columns)]
    if prompt is None or columns is not None:
        raise refused("give either 'prompt' or 'columns'", "prompt")
    listed: list[Any] = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    texts = [p if isinstance(p, str) else "" for p in listed]
    return texts, lambda writer: [writer.text(p) if isinstance(p, str) else writer.ids(p) for p in listed]


class CompletionReply:
    """Texts in the shape of OpenAI's completions; see ``Reply``."""

    def __init__(self, body: CompletionRequest, vocabulary: Vocabulary) -> None:
        self._body, self._text = body, vocabulary.text
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }
        self._usage: dict[str, None] = {"usage": None} if with_usage(body) else {}
        self._offsets: Counter[int] = Counter()

    def whole(self, texts: Sequence[Piece], tally: Tally) -> str:
        """The answer of a request that is no stream."""
        return self._json([self._choice(text) for text in texts], {"usage": Usage.of(tally)})

    def events(self, piece: Piece, first: bool) -> Iterator[str]:
        """The event of a piece."""
        yield self._json([self._choice(piece)], self._usage)

    def last(self, tally: Tally) -> str:
        """The event that brings the usage."""
        return self._json([], {"usage": Usage.of(tally)})

    def _json(self, choices: list[TextChoice], usage: dict[str, Any]) -> str:
        return Completion(**self._head, choices=choices, **usage).model_dump_json(exclude_unset=True)

    def _choice(self, piece: Piece) -> TextChoice:
        wanted = self._body.logprobs is not None
        logprobs = self._logprobs(piece) if wanted else None
        return TextChoice(index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish)

    def _logprobs(self, piece: Piece) -> TextLogprobs:
        tokens, offsets = [self._text(row.id) for row in piece.rows], []
        for token in tokens:
            offsets.append(self._offsets[piece.index])
            self._offsets[piece.index] += len(token)
        return TextLogprobs(
            tokens=tokens,
            token_logprobs=[row.logprob for row in piece.rows],
            top_logprobs=[self._alternatives(row) for row in piece.rows],
            text_offset=offsets,
        )

    def _alternatives(self, row: Row) -> dict[str, float]:
        """By text, the token itself among them; of tokens that read alike the likeliest counts."""
        ranked = sorted({row.id: row.logprob, **dict(row.top)}.items(), key=lambda pair: pair[1])
        return {self._text(token): logprob for token, logprob in ranked}
