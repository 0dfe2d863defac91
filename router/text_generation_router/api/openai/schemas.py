"""Bodies of OpenAI's routes, as they are sent and as they are answered.

Requests are decoded as strictly as native ones; null counts as "not given" everywhere, as in OpenAI's specification.
Fields that the specification has and this server does not honour are listed, so that they can be refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from text_generation_router.chat.messages import MessageBody
from text_generation_router.chat.tools import NamedTool, ToolBody
from text_generation_router.generate_request import F32, I32, U32, Priority, ShortText

Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against guesses by the length of a packet. Asked for by nobody: it is refused when true."""
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """What chat and completions have in common."""

    model: ShortText | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    logit_bias: dict[str, F32] | list[F32] | UnsetType | None = UNSET
    max_tokens: U32 | None = None
    n: U32 | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: F32 | None = None
    top_p: F32 | None = None
    user: ShortText | None = None
    """Whom OpenAI's abuse monitoring would know; nobody is watched here, and the answer does not depend on it."""
    # TGI's, and what other servers have in common with it.
    repetition_penalty: F32 | UnsetType | None = UNSET
    top_k: I32 | None = None
    typical_p: F32 | None = None
    ignore_eos: bool | None = None
    priority: Priority | None = None
    response_format: Any = None
    # Refused: see `parameters.NOT_HERE`.
    allowed_token_ids: Any = None
    bad_words: Any = None
    grammar: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    min_p: Any = None
    min_tokens: Any = None
    stop_token_ids: Any = None
    structured_outputs: Any = None
    use_beam_search: Any = None


class ChatBody(SamplingFields, frozen=True, kw_only=True):
    """Body of ``/v1/chat/completions`` and ``/chat_tokenize``."""

    messages: list[MessageBody]
    max_completion_tokens: U32 | None = None
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | NamedTool | UnsetType | None = UNSET
    tool_prompt: str | None = None
    """TGI's words for templates that know no tools."""
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Harmless, as `user` is.
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: ShortText | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None
    # Refused.
    audio: Any = None
    best_of: U32 | None = None
    functions: Any = None
    function_call: Any = None
    moderation: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None

    @property
    def is_of_tgis_client(self) -> bool:
        """Whether the package `text-generation` sent it, which says every field that it has, null where it was not
        told, and none that it does not have. Biases are a list there, which nobody can use."""
        says_all = UNSET not in (self.repetition_penalty, self.logit_bias, self.tool_choice)
        says_more = (self.stop, self.stream_options, self.max_completion_tokens, self.top_k) != (None,) * 4
        return says_all and not says_more and not self.logit_bias


class CompletionBody(SamplingFields, frozen=True, kw_only=True):
    """Body of ``/v1/completions``."""

    prompt: str | list[str | U32 | list[U32]]
    best_of: U32 | None = None
    echo: bool | None = None
    logprobs: U32 | None = None
    suffix: str | None = None


# ---------------------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float | None
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float | None
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(msgspec.Struct):
    arguments: str
    """JSON, as far as the model wrote it."""
    name: str | UnsetType | None = UNSET


class ToolCallBody(msgspec.Struct):
    function: CalledFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    index: int | UnsetType = UNSET
    """Only in streams."""


class ChatMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallBody] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallBody] | UnsetType = UNSET


class TgiDelta(msgspec.Struct):
    """As the package `text-generation` reads it: a role in each, and of a call all there is, by itself."""

    content: str | None = None
    tool_calls: ToolCallBody | None = None
    role: str = "assistant"


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    """Or a `TgiDelta`: which it is, the request says."""
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class CompletionLogprobs(msgspec.Struct):
    """Of the old API: lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(msgspec.Struct):
    """A whole answer, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class Model(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class ChatTokenized(msgspec.Struct):
    """Answer of TGI's ``/chat_tokenize``."""

    tokenize_response: list[Any]
    templated_text: str
