"""What operators may do to the cache: announce, explain, mark and clear prefixes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any

import torch
from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import Field

from ..cache import SparsePrefixCache
from . import gate
from .refusals import ApiError
from .requests import Message, Salt, Strict, Tool, Utf8Text, checked_request
from .service import Service
from .settings import salted_namespace


class _Whose(Strict):
    """A tenant's namespace.

    Attributes:
        tenant: the name of its key; "" on an open server.
    """

    tenant: Utf8Text = ""
    cache_salt: Salt = ""

    def refuse_unsupported(self) -> None:
        pass


class _Prefix(_Whose):
    """A prompt, or how prompts begin: a text, or a chat."""

    prompt: Utf8Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Admin:
    """The verbs of `POST /cache/...`.

    Args:
        service: whose cache it is.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.verbs: dict[str, Callable[[Request], Awaitable[JSONResponse]]] = {
            "prefill": self._verb(_Prefix, self._announce),
            "explain": self._verb(_Prefix, self._explain),
            "mark": self._verb(_Prefix, self._mark),
            "clear": self._verb(_Whose, self._clear),
        }

    def _verb(self, kind: type[Any], work: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Any]:
        async def verb(request: Request) -> JSONResponse:
            gate.require_admin(request, self._service.settings)
            asked = checked_request(kind, await gate.body_of(request, self._service.settings))
            with self._service.line.place():
                return JSONResponse(await self._service.generation.call(work, asked))

        return verb

    # Each of these runs on the inference thread.

    def _announce(self, asked: _Prefix) -> dict[str, Any]:
        handle, ids = self._handle(asked), self._ids(asked, answering=False)
        with handle.record() as requests:
            handle.prefill(ids)
        info = requests[0]
        return {
            "prompt_tokens": info.prompt_tokens,
            "cached_tokens": info.resumed_tokens,
            "computed_tokens": info.computed_tokens,
            "captured": list(info.captured),
            "reason": str(info.reason),
        }

    def _explain(self, asked: _Prefix) -> dict[str, Any]:
        explanation = self._handle(asked).explain(self._ids(asked, answering=True))
        return {**asdict(explanation), "reason": str(explanation.reason), "text": str(explanation)}

    def _mark(self, asked: _Prefix) -> dict[str, Any]:
        ids = self._ids(asked, answering=False)
        try:
            self._handle(asked).mark(ids)
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        return {"marked_tokens": ids.shape[-1]}

    def _clear(self, asked: _Whose) -> dict[str, Any]:
        handle = self._handle(asked)
        before = handle.stats().checkpoints
        handle.clear()
        return {"cleared_checkpoints": before}

    def _handle(self, asked: _Whose) -> SparsePrefixCache:
        known = self._service.settings.api_keys.values()
        if asked.tenant not in known and (known or asked.tenant):
            names = ", ".join(repr(name) for name in dict.fromkeys(known)) or "'' on a server without API keys"
            raise ApiError(400, f"tenant: {asked.tenant[:60]!a} has no key here; give {names}", "tenant")
        return self._service.tenants.handle(salted_namespace(asked.tenant, asked.cache_salt))

    def _ids(self, asked: _Prefix, answering: bool) -> torch.Tensor:
        """The prompt, `(1, length)`, as a request for an answer would have it; or how such prompts begin."""
        service = self._service
        if (asked.prompt is None) == (asked.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt")
        if asked.prompt is not None:
            return self._checked(service.tokenizer(asked.prompt, return_tensors="pt")["input_ids"])
        handler = service.endpoints[0].handler
        messages = [message.plain() for message in asked.messages or ()]
        modality = service.manager.get_model_modality(service.model, processor=service.processor)
        try:
            inputs = service.processor.apply_chat_template(
                handler.get_processor_inputs_from_messages(messages, modality),
                add_generation_prompt=answering,
                tools=[tool.model_dump(exclude_none=True) for tool in asked.tools or ()] or None,
                return_tensors="pt",
                return_dict=True,
                tokenize=True,
                **{**service.chat_template_kwargs, **(asked.chat_template_kwargs or {})},
            )
        except Exception as error:  # whatever a template says
            raise ApiError(400, f"no prompt can be made of this by the model's chat template: {error}") from None
        return self._checked(inputs["input_ids"])

    @staticmethod
    def _checked(ids: Any) -> torch.Tensor:
        if ids.shape[-1] < 2:
            raise ApiError(400, f"the prefix has {ids.shape[-1]} tokens; give at least 2", "prompt")
        checked: torch.Tensor = ids.long()
        return checked
