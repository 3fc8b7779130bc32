"""The tokens of a request's prompt, and whose it is, before any model sees it: what a router has to know."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from transformers import ProcessorMixin
from transformers.cli.serving.utils import BaseHandler, Modality

from ..planning.cuts import Tokens
from .handlers import Responses
from .requests import ChatRequest, CompletionRequest, ResponsesRequest, checked_request
from .settings import salted_namespace


class PromptReader:
    """Reads prompts as the server of a model would, without the model.

    Args:
        processor: or tokenizer, of that model.
        template: for every chat.
    """

    def __init__(self, processor: Any, template: dict[str, Any]) -> None:
        self._processor, self._template = processor, template
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._modality = Modality.VLM if isinstance(processor, ProcessorMixin) else Modality.LLM

    def read(self, path: str, body: bytes, tenant: str) -> tuple[str, Tokens, str]:
        """A request's namespace, the ids of its prompt, int32 `(N,)`, and the session that it names, "" for none.

        Raises:
            Exception: of any kind, where no prompt can be made of it; who serves it will say what is wrong.
        """
        plain = json.loads(body)
        if path.startswith("/cache/"):
            tenant = plain.get("tenant", "")
            ids = self._chat(plain) if "messages" in plain else self._text(plain["prompt"])
        elif path == "/v1/completions":
            ids = self._text(checked_request(CompletionRequest, plain).prompt)
        elif path == "/v1/responses":
            asked = checked_request(ResponsesRequest, plain).upstream()
            tools = Responses._normalize_tools(asked.get("tools"))
            ids = self._chat({**asked, "messages": Responses._normalize_input(asked), "tools": tools})
        else:
            ids = self._chat(checked_request(ChatRequest, plain).upstream())
        namespace = salted_namespace(tenant, plain.get("cache_salt") or "")
        session = plain.get("prompt_cache_key")
        return namespace, np.asarray(ids, dtype=np.int32).reshape(-1), session if isinstance(session, str) else ""

    def _text(self, text: str) -> Any:
        return self._tokenizer(text)["input_ids"]

    def _chat(self, asked: dict[str, Any]) -> Any:
        inputs = self._processor.apply_chat_template(
            BaseHandler.get_processor_inputs_from_messages(asked["messages"], self._modality),
            add_generation_prompt=True,
            tools=asked.get("tools"),
            return_dict=True,
            tokenize=True,
            **{**self._template, **(asked.get("chat_template_kwargs") or {})},
        )
        return inputs["input_ids"]
