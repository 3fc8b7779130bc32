"""What clients may ask for: each endpoint's fields, checked whole before anything runs.

A field is honoured, or refused by name; only what cannot change an answer is read and left alone, such as `user`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .refusals import ApiError, not_honoured


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a surrogate pair, which no text has") from error
    return text


def _json_object(text: str) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("it must be a JSON object")
    return text


Utf8Text = Annotated[str, AfterValidator(_encodable)]
Arguments = Annotated[Utf8Text, AfterValidator(_json_object)]
Stop = Annotated[Utf8Text, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Salt = Annotated[Utf8Text, Field(max_length=256)]
MOST_STOPS, MOST_CHOICES, MOST_LOGPROBS = 16, 16, 20


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Lenient(BaseModel):
    """What clients send back as they got it, with fields that say nothing more."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(_Lenient):
    type: Literal["text", "input_text", "output_text"]
    text: Utf8Text


class _Called(_Lenient):
    name: Utf8Text
    arguments: Arguments


class _ToolCall(_Lenient):
    id: Utf8Text | None = None
    type: Literal["function"] = "function"
    function: _Called


class Message(_Lenient):
    """A message of a chat; `developer` is what newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Utf8Text | list[TextPart] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: Utf8Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to an assistant's message")
        return self

    def plain(self) -> dict[str, Any]:
        """As transformers takes it."""
        plain = self.model_dump(exclude_none=True)
        return {**plain, "role": "system" if self.role == "developer" else self.role}


class _Function(_Lenient):
    name: Utf8Text
    description: Utf8Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Lenient):
    type: Literal["function"]
    function: _Function


class FlatTool(_Function):
    type: Literal["function"]


class _StreamOptions(_Lenient):
    include_usage: bool | None = None


class ApiRequest(Strict):
    """What every endpoint takes."""

    model: Utf8Text | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    cache_salt: Salt | None = None
    generation_config: Utf8Text | None = None
    # Nothing that an answer depends on.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @field_validator("generation_config")
    @classmethod
    def _known_settings(cls, text: str | None) -> str | None:
        return None if text is None else _sampling_settings(text)

    def upstream(self) -> dict[str, Any]:
        """What transformers' handler is given: without what the server itself sees to."""
        names = ("model", "stream", "temperature", "top_p", "generation_config")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def refuse_unsupported(self) -> None:
        """Refuse what would change an answer and cannot be done.

        Raises:
            ApiError: Names the field.
        """

    # What follows is of one endpoint or another; the others have the same by their defaults.

    @property
    def choices(self) -> int:
        return 1

    @property
    def top(self) -> int | None:
        """How many likely tokens to report for each token; None for no log-probabilities."""
        return None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return ()

    @property
    def includes_usage(self) -> bool:
        return False


class _Completing(ApiRequest):
    """What both endpoints of completions take."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    max_tokens: Count | None = None
    # Upstream turns it into a repetition penalty of 1 + frequency_penalty, which must be positive.
    frequency_penalty: Annotated[float, Field(gt=-1, le=2)] | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream_options: _StreamOptions | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        wrong = [key for key in bias or {} if not (key.isascii() and key.isdecimal() and len(key) < 10)]
        if wrong:
            raise ValueError(f"its key {wrong[0]!r} is no token id")
        return bias

    def upstream(self) -> dict[str, Any]:
        plain = super().upstream()
        names = ("max_tokens", "frequency_penalty", "logit_bias")
        plain |= {name: value for name in names if (value := getattr(self, name)) is not None}
        return {**plain, "stop": list(self.stop_strings)} if self.stop_strings else plain

    def refuse_unsupported(self) -> None:
        if self.presence_penalty:
            raise not_honoured("presence_penalty", "use frequency_penalty, or leave it out")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for streams: set stream, or leave it out", "stream_options")
        if self.stream and self.top is not None:
            raise not_honoured("logprobs", "it is only for answers that are not streamed")

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(_Completing):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: Any = None
    modalities: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None
    audio: Any = None
    web_search_options: Any = None
    functions: Any = None
    function_call: Any = None

    def upstream(self) -> dict[str, Any]:
        plain = {**super().upstream(), "messages": [message.plain() for message in self.messages]}
        if self.tools and self.tool_choice != "none":
            plain["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        for name in ("max_completion_tokens", "chat_template_kwargs"):
            plain |= {name: value} if (value := getattr(self, name)) is not None else {}
        return plain

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        _refuse_tool_choice(self.tool_choice)
        if (self.response_format or {"type": "text"}).get("type") != "text":
            raise not_honoured("response_format", "ask for text, and parse it yourself")
        if self.modalities not in (None, ["text"]):
            raise not_honoured("modalities", "it answers in text alone")
        for name, instead in (
            ("audio", "it answers in text alone"),
            ("web_search_options", "it searches nothing; give it as a tool of yours"),
            ("functions", "use tools"),
            ("function_call", "use tool_choice"),
        ):
            if getattr(self, name) is not None:
                raise not_honoured(name, instead)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true beside it", "top_logprobs")

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Completing):
    """`POST /v1/completions`."""

    prompt: Utf8Text
    suffix: Utf8Text | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_text(cls, prompt: Any) -> Any:
        return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str) else prompt

    def upstream(self) -> dict[str, Any]:
        suffix = {} if self.suffix is None else {"suffix": self.suffix}
        return {**super().upstream(), "prompt": self.prompt, **suffix}

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.echo:
            raise not_honoured("echo", "put the prompt before the answer yourself")
        if self.best_of not in (None, self.choices):
            raise not_honoured("best_of", "ask for n answers, and choose")

    @property
    def top(self) -> int | None:
        return self.logprobs


class _InputMessage(_Lenient):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Utf8Text | list[TextPart]

    def plain(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _FunctionCall(_Lenient):
    type: Literal["function_call"]
    call_id: Utf8Text
    name: Utf8Text
    arguments: Arguments

    def plain(self) -> dict[str, Any]:
        return self.model_dump()


class _FunctionOutput(_Lenient):
    type: Literal["function_call_output"]
    call_id: Utf8Text
    output: Utf8Text

    def plain(self) -> dict[str, Any]:
        return self.model_dump()


class _ReasoningPart(_Lenient):
    text: Utf8Text


class _Reasoning(_Lenient):
    type: Literal["reasoning"]
    content: list[_ReasoningPart] | None = None

    def plain(self) -> dict[str, Any]:
        return self.model_dump()


class ResponsesRequest(ApiRequest):
    """`POST /v1/responses`."""

    input: (
        Utf8Text | Annotated[list[_InputMessage | _FunctionCall | _FunctionOutput | _Reasoning], Field(min_length=1)]
    )
    instructions: Utf8Text | None = None
    max_output_tokens: Count | None = None
    tools: list[FlatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    max_tool_calls: Any = None
    top_logprobs: int | None = None
    truncation: str | None = None
    include: list[str] | None = None
    stream_options: _StreamOptions | None = None
    reasoning: Any = None
    parallel_tool_calls: Any = None

    @field_validator("input", mode="before")
    @classmethod
    def _parts_of_one_message(cls, given: Any) -> Any:
        """A list of parts alone is one message of the user's."""
        parts = isinstance(given, list) and bool(given) and all(isinstance(item, Mapping) for item in given)
        if parts and all(item.get("type") in ("input_text", "text") and "role" not in item for item in given):
            return [{"role": "user", "content": given}]
        return given

    @field_validator("input")
    @classmethod
    def _begins_with_a_message(cls, given: Any) -> Any:
        if isinstance(given, list) and not isinstance(given[0], _InputMessage):
            raise ValueError("its first item must be a message")
        return given

    def upstream(self) -> dict[str, Any]:
        given = self.input if isinstance(self.input, str) else [item.plain() for item in self.input]
        plain = {**super().upstream(), "stream": bool(self.stream), "input": given}
        for name in ("instructions", "max_output_tokens", "chat_template_kwargs"):
            plain |= {name: value} if (value := getattr(self, name)) is not None else {}
        if self.tools and self.tool_choice != "none":
            plain["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return plain

    def refuse_unsupported(self) -> None:
        _refuse_tool_choice(self.tool_choice)
        kind = (self.text or {}).get("format") or {"type": "text"}
        if not isinstance(kind, dict) or kind.get("type") != "text":
            raise not_honoured("text", "ask for text, and parse it yourself")
        for name in ("previous_response_id", "conversation", "prompt", "max_tool_calls", "top_logprobs", "background"):
            if getattr(self, name) not in (None, False, 0):
                raise not_honoured(name, "the server keeps no responses and runs no tools; send the whole input")
        if self.truncation not in (None, "disabled"):
            raise not_honoured("truncation", "shorten the input yourself")
        if "message.output_text.logprobs" in (self.include or ()):
            raise not_honoured("include", "for log-probabilities use /v1/chat/completions")


def checked_request(kind: type[ApiRequest], body: Any) -> Any:
    """A body as a request of this kind, all of whose fields are honoured.

    Raises:
        ApiError: Names the field, the value and the remedy.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}")
    try:
        asked = kind.model_validate(body)
    except ValidationError as error:
        raise _named(error) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    asked.refuse_unsupported()
    return asked


def _named(error: ValidationError) -> ApiError:
    """The first thing that is wrong, of those of an alternative the one that came furthest."""
    details = error.errors(include_url=False, include_context=False)
    worst = max(details, key=lambda detail: len(detail["loc"]))
    path = ".".join(str(part) for part in worst["loc"] if not _is_label(part))
    if worst["type"] == "extra_forbidden":
        return ApiError(400, f"{path} is not a field of this endpoint; leave it out", path, "unknown_parameter")
    if worst["type"] == "missing":
        return ApiError(400, f"{path} is missing", path, "missing_required_parameter")
    value = repr(worst["input"])
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    shown = shown.encode("ascii", "backslashreplace").decode()
    said = worst["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{path}: {shown} cannot be used: {said[:1].lower()}{said[1:]}", path, "invalid_value")


def _is_label(part: Any) -> bool:
    """Whether a part of pydantic's path names an alternative and no field."""
    return isinstance(part, str) and ("[" in part or part in _LABELS)


_LABELS = {"str", "int", "float", "bool", "_InputMessage", "_FunctionCall", "_FunctionOutput", "_Reasoning"}


def _refuse_tool_choice(choice: str | dict[str, Any] | None) -> None:
    if choice not in (None, "auto", "none"):
        raise not_honoured("tool_choice", "it cannot be forced; use auto or none")


class _Sampling(BaseModel):
    """What transformers' own chat client sends along as a generation config, as far as it concerns sampling."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    max_new_tokens: Count | None = None
    eos_token_id: Id | list[Id] | None = None
    pad_token_id: Id | None = None
    bos_token_id: Id | None = None


# Nothing is asked for by these.
_IDLE = {"num_beams": (1,), "num_return_sequences": (1,), "use_cache": (True,)}
_NOTES = ("transformers_version", "_from_model_config")


def _sampling_settings(text: str) -> str:
    """A generation config as JSON, with nothing in it but settings of sampling.

    Raises:
        ValueError: It is none, or sets something else.
    """
    given = {name: value for name, value in json.loads(_json_object(text)).items() if value is not None}
    settings = _Sampling.model_validate(given).model_dump(exclude_none=True)
    other = [name for name in given if name not in (*settings, *_NOTES) and given[name] not in _IDLE.get(name, ())]
    if other:
        raise ValueError(f"{other[0]} cannot be set by a request; it takes {', '.join(_Sampling.model_fields)}")
    return json.dumps(settings)
