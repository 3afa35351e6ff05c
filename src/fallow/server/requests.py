"""The request bodies of the OpenAI API that this server understands, and our few additional fields.

Field names, meanings and limits follow https://platform.openai.com/docs/api-reference. A field that is not listed
here is refused; those under "accepted, without effect" concern OpenAI's own platform.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 256
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

# A list stops at its first error: a hostile body must not cost a report of a million of them.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]


def _wrong(param: str, message: str) -> PydanticCustomError:
    """An error about fields that do not fit together; ``param`` is the one to change."""
    return PydanticCustomError("wrong_together", "{message}", {"message": message, "param": param})


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, regex_engine="rust-regex")


class StreamOptions(_Body):
    include_usage: bool | None = Field(None, description="Send a last chunk with the token counts and no choices.")
    include_obfuscation: bool | None = Field(None, description="Accepted, without effect.")


class _Generation(_Body):
    """What both kinds of completion have in common."""

    model: str | None = Field(None, max_length=256, description="Id of the model; default: the one that is served.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="How many choices to write for each prompt.")
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the most likely token.")
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, max_length=1024, description="Token id (as a string) to what is added to its logit.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same text.")
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = Field(
        None, description="Strings at which the text ends; they are not part of it."
    )
    stream: bool | None = Field(None, description="Send the text as server-sent events while it is written.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=1024, description="Accepted, without effect.")
    top_k: int | None = Field(None, ge=0, lt=2**31, description="Extension. 0: off.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension. 0: off.")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="Extension. 1: off.")
    ignore_eos: bool | None = Field(None, description="Extension. Go on past the end-of-sequence token.")
    stop_token_ids: Annotated[TokenIds, Field(max_length=128)] | None = Field(
        None, description="Extension. Tokens at which the text ends."
    )

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> _Generation:
        if self.stream_options is not None and not self.stream:
            raise _wrong("stream_options", "stream_options is only allowed when stream is true.")
        return self


class ContentPart(_Body):
    """One part of a message's content; of its kinds only ``text`` (and an assistant's ``refusal``) can be read."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(max_length=64)
    text: str | None = None
    refusal: str | None = None


class FunctionCall(_Body):
    name: str = Field(min_length=1, max_length=64)
    arguments: str = Field(description="A JSON object, written as a string.")


class ToolCall(_Body):
    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)] | None = None
    name: str | None = Field(None, max_length=256)
    refusal: str | None = Field(None, description="Accepted from an assistant's earlier answer.")
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = Field(None, max_length=128)
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=1024)


class JsonSchemaFormat(_Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="A JSON Schema.")
    strict: bool | None = Field(
        None, description="Refuse a schema that cannot be followed in all points; else those points are ignored."
    )


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise _wrong(
                "response_format.json_schema",
                "response_format.json_schema is missing: it is required where type is json_schema.",
            )
        return self


class FunctionDefinition(_Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON Schema of the arguments, an object.")
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Body):
    name: str = Field(min_length=1, max_length=64)


class NamedTool(_Body):
    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(_Generation):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="Default: up to the context.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = Field(None, description="Only text.")
    # Accepted, without effect.
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _wrong("top_logprobs", "top_logprobs is only allowed when logprobs is true.")
        if not self.tools and self.tool_choice not in (None, "none"):
            raise _wrong("tool_choice", "tool_choice is only allowed when tools are given.")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if all(tool.function.name != name for tool in self.tools or []):
                raise _wrong("tool_choice", f"tool_choice names the function {name!r}, which is not among the tools.")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) != len(names):
            raise _wrong("tools", "tools holds two functions of the same name.")
        wants_json = self.response_format is not None and self.response_format.type != "text"
        if wants_json and self.tools and self.tool_choice != "none":
            raise _wrong(
                "response_format", "response_format cannot be combined with tools, except with tool_choice none."
            )
        return self


class CompletionRequest(_Generation):
    """``POST /v1/completions``."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    ) = Field(description="A text, token ids, or a list of either.")
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = Field(None, description="Put the prompt before the text.")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Only the value of n.")
    suffix: None = Field(None, description="Not supported: must be null.")

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _wrong("best_of", "best_of is only supported with the value of n.")
        if self.echo and self.logprobs is not None:
            raise _wrong("echo", "echo cannot be combined with logprobs: this server scores only the tokens it writes.")
        return self
