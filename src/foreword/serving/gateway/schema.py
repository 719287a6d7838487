"""What requests may say. Fields of OpenAI's that nothing here can do take their harmless value only."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def whole(value: Any) -> Any:
    """A number without a fraction as an integer: JSON knows no difference between 16 and 16.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(whole)
Name = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Label = Annotated[str, Field(max_length=512)]
Cell = str | int | float
Row = Annotated[dict[Annotated[str, Field(max_length=256)], Cell], Field(min_length=1, max_length=64)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]
MOST = 2**31 - 1
MOST_TEXTS = 1024
"""Bounds that stand in the API's description; the server's own, lower ones are its settings."""

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

CANNOT = {
    "prompt_embeds": "soft prompts are loaded by name, never taken from a request",
    "best_of": "ask for n texts and pick one",
    "echo": "the answer holds new text only",
    "suffix": "text is written at the end only",
    "tools": "the model calls no tools",
    "tool_choice": "the model calls no tools",
    "functions": "the model calls no functions",
    "function_call": "the model calls no functions",
    "response_format": "answers are plain text",
    "modalities": "answers are plain text",
    "audio": "answers are plain text",
    "prediction": "there are no predicted outputs",
    "web_search_options": "nothing is searched",
    "reasoning_effort": "no reasoning is set apart",
    "verbosity": "say in the text how long the answer should be, and bound it with max_tokens",
    "moderation": "nothing is moderated",
    "chat_template": "the template is the model's own",
    "chat_template_kwargs": "the template is the model's own",
}
"""Fields that OpenAI or vLLM have and this gateway has not, and why."""


def one_of(schema: dict[str, Any], *names: str) -> None:
    """Describes that exactly one of these fields has a value."""
    schema["oneOf"] = [{"required": [name]} for name in names]
    for name in names:
        described = schema["properties"][name]
        described["anyOf"] = [kind for kind in described["anyOf"] if kind != {"type": "null"}]
        described.pop("default")


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = STRICT
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(BaseModel):
    """What texts and chats have in common."""

    model_config = STRICT
    model: Name = Field(description="A soft prompt's name, name@revision, or the plain model's name.")
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(default=None, description="0 is greedy; else 1.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST), WHOLE] | None = Field(
        default=None, description="0 and -1: all tokens."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Bias | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MOST), WHOLE] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    user: Label | None = None
    metadata: dict[str, Label] | None = None
    store: bool | None = None
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
IdPrompts = Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS)]


class CompletionRequest(Generation):
    """``POST /v1/completions``: a text, or columns for the soft prompt's own template."""

    model_config = ConfigDict(**STRICT, json_schema_extra=lambda schema: one_of(schema, "prompt", "columns"))

    prompt: str | Prompts | Ids | IdPrompts | None = Field(
        default=None, description="Texts or token ids to go on from."
    )
    columns: Row | None = Field(default=None, description="Instead of prompt: a row for the soft prompt's template.")
    logprobs: Annotated[int, Field(ge=0, le=100), WHOLE] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat. What OpenAI's client adds to an answer that is sent back is passed over."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_TEXTS)]
    name: Label | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class TextFormat(BaseModel):
    """Plain text, the only format there is."""

    model_config = STRICT
    type: Literal["text"]


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_TEXTS)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=100), WHOLE] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None


class ClassifyRequest(BaseModel):
    """``POST /v1/classify``: one row or several, each a text or its columns."""

    model_config = STRICT
    model: Name = Field(description="A soft prompt that classifies, an ensemble, or the plain model (with task_of).")
    input: str | Row | Annotated[list[str | Row], Field(min_length=1, max_length=MOST_TEXTS)]
    task_of: Name | None = Field(
        default=None, description="With the plain model: whose template and label words to use."
    )
    logprobs: bool | None = Field(default=None, description="Log-probabilities of the label words too.")
    members: bool | None = Field(default=None, description="Each member of an ensemble too.")
    user: Label | None = None


class LoadRequest(BaseModel):
    """``POST /v1/load_soft_prompt``."""

    model_config = STRICT
    name: Name
    path: Annotated[str, Field(min_length=1, max_length=1024)] | None = Field(
        default=None, description="Its folder, relative to the store; else the place of that name."
    )
    load_inplace: bool | None = Field(
        default=None, description="Let it take the place of what is loaded under this name."
    )


class UnloadRequest(BaseModel):
    """``POST /v1/unload_soft_prompt``."""

    model_config = STRICT
    name: Name
