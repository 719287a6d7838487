"""What answers look like; OpenAI's shapes, and ours beside them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from foreword.serving.gateway.texts import Tally

Finished = Literal["stop", "length", "abort"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Any answer that is an error."""

    error: ErrorDetail


class PromptDetails(BaseModel):
    """Of the context's tokens: how many were cached, how many are virtual."""

    cached_tokens: int
    virtual_tokens: int


class Usage(BaseModel):
    """Tokens of a request; ``prompt_tokens`` has the virtual ones in it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, tally: Tally) -> Usage:
        """From the counts."""
        return cls(
            prompt_tokens=tally.prompt,
            completion_tokens=tally.completion,
            total_tokens=tally.prompt + tally.completion,
            prompt_tokens_details=PromptDetails(cached_tokens=tally.cached, virtual_tokens=tally.virtual),
        )


class TextLogprobs(BaseModel):
    """Log-probabilities of a text's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One text, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Finished | None = None


class Completion(BaseModel):
    """Answer of ``/v1/completions``; in a stream every event has this shape."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token that came, and those that might have."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """The assistant's answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finished


class Chat(BaseModel):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """More of an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finished | None = None


class ChatChunk(BaseModel):
    """An event of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class MemberAnswer(BaseModel):
    """What one member of an ensemble says."""

    label: str
    probs: list[float]
    probabilities: dict[str, float]


class Classified(BaseModel):
    """One input's probabilities, in the classes' order and by class."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    probabilities: dict[str, float]
    logprobs: dict[str, float] | None = Field(
        default=None, description="Summed over the label words' tokens, before any bias of the class."
    )
    members: list[MemberAnswer] | None = None


class Classification(BaseModel):
    """Answer of ``/v1/classify``."""

    id: str
    object: Literal["classification"] = "classification"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class MemberCard(BaseModel):
    """A soft prompt of an ensemble."""

    kind: Literal["rows", "prefix"]
    tokens: int
    nbytes: int


class PromptCard(BaseModel):
    """What is known of a soft prompt; most of it only once it is loaded."""

    loaded: bool
    revision: str | None = None
    kind: Literal["rows", "prefix"] | None = None
    tokens: int | None = Field(default=None, description="Virtual tokens.")
    nbytes: int | None = None
    classes: list[str] | None = None
    columns: list[str] | None = None
    template: str | None = None
    members: list[MemberCard] | None = Field(default=None, description="Several: an ensemble.")


class ModelCard(BaseModel):
    """A model as clients list it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "foreword"
    root: str
    parent: str | None
    max_model_len: int | None
    soft_prompt: PromptCard | None = None


class ModelList(BaseModel):
    """Answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    has_more: bool


class Health(BaseModel):
    """Whether requests can be taken."""

    status: Literal["ok"] = "ok"


class LoadReply(BaseModel):
    """A soft prompt that is loaded now."""

    name: str
    revision: str
    tokens: int
    nbytes: int


class UnloadReply(BaseModel):
    """A soft prompt that is loaded no longer."""

    name: str
    unloaded: Literal[True] = True
