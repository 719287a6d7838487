"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.types import ASGIApp

from foreword.serving.gateway.answer import answer, with_usage
from foreword.serving.gateway.decoding import decoding_of, most_tokens, stops_of, texts_of
from foreword.serving.gateway.errors import refused
from foreword.serving.gateway.logprobs import Vocabulary, utf8
from foreword.serving.gateway.logs import Call
from foreword.serving.gateway.replies import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    Delta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from foreword.serving.gateway.schema import ChatRequest, Message
from foreword.serving.gateway.service import Gateway
from foreword.serving.gateway.texts import Order, Piece, Row, Tally


async def chat(gateway: Gateway, body: ChatRequest, call: Call) -> ASGIApp:
    """Answers, whole or as a stream."""
    return await answer(gateway, body, order_of(gateway, body), ChatReply(body, gateway.vocabulary), call)


def order_of(gateway: Gateway, body: ChatRequest) -> Order:
    """What the request wants written."""
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    messages = [{"role": role_of(m), "content": text_of(m)} for m in body.messages]
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return Order(
        model=body.model,
        texts=[m["content"] for m in messages],
        contexts=lambda writer: [writer.chat(messages)],
        count=1,
        n=texts_of(body, 1, gateway.settings),
        stops=stops_of(body),
        decoding=decoding_of(body, (body.top_logprobs or 0) if body.logprobs else None, gateway.base.capabilities),
        max_tokens=most_tokens(getattr(body, field), field, gateway.settings),
    )


def role_of(message: Message) -> str:
    """The role as chat templates know it; "developer" is OpenAI's later word for "system"."""
    return "system" if message.role == "developer" else message.role


def text_of(message: Message) -> str:
    """The message's text."""
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatReply:
    """Texts in the shape of OpenAI's chats; see ``Reply``."""

    def __init__(self, body: ChatRequest, vocabulary: Vocabulary) -> None:
        self._body, self._text = body, vocabulary.text
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }
        self._usage: dict[str, None] = {"usage": None} if with_usage(body) else {}

    def whole(self, texts: Sequence[Piece], tally: Tally) -> str:
        """The answer of a request that is no stream."""
        choices = [self._choice(text) for text in texts]
        return Chat(**self._head, choices=choices, usage=Usage.of(tally)).model_dump_json()

    def events(self, piece: Piece, first: bool) -> Iterator[str]:
        """The event of a piece; before a text's first one, who speaks."""
        if first:
            yield self._json(
                [ChatChunkChoice(index=piece.index, delta=Delta(role="assistant", content=""), finish_reason=None)],
                self._usage,
            )
        yield self._json([self._part(piece)], self._usage)

    def last(self, tally: Tally) -> str:
        """The event that brings the usage."""
        return self._json([], {"usage": Usage.of(tally)})

    def _json(self, choices: list[ChatChunkChoice], usage: dict[str, Any]) -> str:
        chunk = ChatChunk(**self._head, object="chat.completion.chunk", choices=choices, **usage)
        return chunk.model_dump_json(exclude_unset=True)

    def _part(self, piece: Piece) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=piece.index,
            delta=Delta(content=piece.text),
            logprobs=self._logprobs(piece.rows),
            finish_reason=piece.finish,
        )

    def _choice(self, piece: Piece) -> ChatChoice:
        return ChatChoice(
            index=piece.index,
            message=ChatMessage(content=piece.text),
            logprobs=self._logprobs(piece.rows),
            finish_reason=piece.finish or "abort",
        )

    def _logprobs(self, rows: Sequence[Row]) -> ChatLogprobs | None:
        return ChatLogprobs(content=[self._token(row) for row in rows]) if self._body.logprobs else None

    def _token(self, row: Row) -> TokenLogprob:
        top = [TopLogprob(**self._named(i, p)) for i, p in row.top[: self._body.top_logprobs or 0]]
        return TokenLogprob(**self._named(row.id, row.logprob), top_logprobs=top)

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": utf8(text)}
