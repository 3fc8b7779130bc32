"""What transformers' handlers answer, completed: cached tokens, choices, log-probabilities, the end of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from .refusals import ApiError
from .requests import ApiRequest
from .stops import first_stop
from .tickets import Cancelled, Ticket


JsonObject = dict[str, Any]
_DONE = "data: [DONE]\n\n"
OVER = "its time is over"


def failure(ticket: Ticket) -> ApiError:
    """The error for a client whose request did not come to its end."""
    error = ticket.error
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Cancelled):
        return cancelled(str(error))
    return ApiError(500, f"the model could not answer: {type(error).__name__}", code="generation_failed")


def cancelled(why: str) -> ApiError:
    """The error for a request that was ended."""
    if why == OVER:
        return ApiError(408, "the request took too long; ask for less, or raise --timeout", code="timeout")
    return ApiError(503, f"the request was ended: {why}", code="ended", headers={"Retry-After": "10"})


def completed(response: Any, ticket: Ticket, asked: ApiRequest, token_text: Callable[[int], str]) -> JsonObject:
    """An answer that is not streamed, whole."""
    body: JsonObject = json.loads(response.body)
    usage = body["usage"]
    if "prompt_tokens" in usage:
        usage["prompt_tokens_details"] = _details(usage, "prompt_tokens_details", ticket)
    else:
        usage["input_tokens_details"] = _details(usage, "input_tokens_details", ticket)
    for choice in body.get("choices", ()):
        _end_at_stop(choice, ticket, asked)
        if ticket.top_logprobs is not None:
            chat = "message" in choice
            choice["logprobs"] = (_chat_logprobs if chat else _text_logprobs)(ticket.logprobs, token_text)
    return body


def joined(bodies: list[JsonObject]) -> JsonObject:
    """Several answers to one prompt as the choices of one."""
    first = bodies[0]
    first["choices"] = [{**body["choices"][0], "index": index} for index, body in enumerate(bodies)]
    usage = first["usage"]
    usage["completion_tokens"] = sum(body["usage"]["completion_tokens"] for body in bodies)
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return first


class Stream:
    """The events of one answer, of one or more choices, as they go out.

    Args:
        asked: what the client wants to see.
        name: the answer's id.
    """

    def __init__(self, asked: ApiRequest, name: str) -> None:
        self._asked, self._name = asked, name
        self._usage: JsonObject | None = None

    async def choice(self, events: AsyncIterator[Any], ticket: Ticket, index: int) -> AsyncIterator[str]:
        """Pass the events of one choice on.

        Raises:
            ApiError: The model failed, or the request's time is over.
        """
        async for text in events:
            for line in _events(text):
                event = json.loads(line)
                if ticket.error is not None and ("error" in event or event.get("type") == "error"):
                    raise failure(ticket)
                yield _sse(self._event(event, ticket, index))

    def _event(self, event: JsonObject, ticket: Ticket, index: int) -> JsonObject:
        if "choices" not in event:  # of the endpoint of responses
            usage = (event.get("response") or {}).get("usage")
            if usage:
                usage["input_tokens_details"] = _details(usage, "input_tokens_details", ticket)
            return event
        event["id"] = self._name
        for choice in event["choices"]:
            choice["index"] = index
            if choice.get("finish_reason") == "length" and ticket.stopped:
                choice["finish_reason"] = "stop"
        if usage := event.get("usage"):
            self._add(usage, ticket)
            last = index == self._asked.choices - 1
            if self._asked.includes_usage or not last:
                del event["usage"]
            else:
                event["usage"] = self._usage
        return event

    def _add(self, usage: JsonObject, ticket: Ticket) -> None:
        known = self._usage
        if known is None:
            self._usage = {**usage, "prompt_tokens_details": _details(usage, "prompt_tokens_details", ticket)}
        else:
            known["completion_tokens"] += usage["completion_tokens"]
            known["total_tokens"] += usage["completion_tokens"]

    def end(self, model: str, kind: str, created: int) -> list[str]:
        """What closes the stream: the usage, where it was asked for apart, and the last word."""
        parts = []
        if self._asked.includes_usage and self._usage is not None:
            last = {"id": self._name, "object": kind, "created": created, "model": model, "choices": []}
            parts.append(_sse({**last, "usage": self._usage}))
        return [*parts, _DONE]


def failed_stream(error: ApiError, responses: bool) -> list[str]:
    """The end of a stream that fails."""
    if responses:
        told = {"type": "error", "message": error.message, "code": error.code, "param": None}
        return [_sse(told), _DONE]
    return [_sse(error.body), _DONE]


def _details(usage: JsonObject, name: str, ticket: Ticket) -> JsonObject:
    return {**(usage.get(name) or {}), "cached_tokens": ticket.cached_tokens}


def _end_at_stop(choice: JsonObject, ticket: Ticket, asked: ApiRequest) -> None:
    holder: JsonObject = choice.get("message", choice)
    name = "content" if "message" in choice else "text"
    text = holder.get(name) or ""
    cut = first_stop(text, asked.stop_strings)
    if cut is not None:
        holder[name] = text[:cut]
        if choice["finish_reason"] == "length":
            choice["finish_reason"] = "stop"
    ticket.stopped = cut is not None


def _chat_logprobs(found: list[Any], text: Callable[[int], str]) -> JsonObject:
    def entry(token: int, logprob: float) -> JsonObject:
        shown = text(token)
        return {"token": shown, "logprob": logprob, "bytes": list(shown.encode("utf-8", "replace"))}

    content = [
        {**entry(token, logprob), "top_logprobs": [entry(other, value) for other, value in likely]}
        for token, logprob, likely in found
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(found: list[Any], text: Callable[[int], str]) -> JsonObject:
    tokens = [text(token) for token, _, _ in found]
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [logprob for _, logprob, _ in found],
        "top_logprobs": [_by_text(likely, text) for _, _, likely in found],
        "text_offset": ends[:-1],
    }


def _by_text(likely: list[tuple[int, float]], text: Callable[[int], str]) -> JsonObject:
    """Log-probabilities by their tokens' text, or by the id of one whose text another has, too."""
    found: JsonObject = {}
    for token, value in likely:
        shown = text(token)
        found[shown if shown and shown not in found else f"token_id:{token}"] = value
    return found


def _events(text: Any) -> list[str]:
    """The data of the events in a piece of a stream; a piece holds whole events."""
    plain = text.decode() if isinstance(text, bytes) else text
    return [part.removeprefix("data: ") for part in plain.split("\n\n") if part.startswith("data: ")]


def _sse(event: JsonObject) -> str:
    kind = f"event: {event['type']}\n" if "type" in event and "choices" not in event else ""
    return f"{kind}data: {json.dumps(event, ensure_ascii=False)}\n\n"
