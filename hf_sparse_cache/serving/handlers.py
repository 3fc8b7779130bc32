"""transformers' handlers of the three endpoints, with sampling as their clients mean it."""

from __future__ import annotations

import copy
import json
from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler

from .refusals import ApiError


_COLDEST = 1e-3  # below, logits divided by it are no longer finite
_MOST_TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class _Sampling:
    """Samples when a client asks for it."""

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False
    ) -> Any:
        settings = json.loads(body.get("generation_config") or "{}")
        base = copy.deepcopy(model_generation_config)
        base.update(**settings)
        body = {name: value for name, value in body.items() if name != "generation_config"}
        config = super()._build_generation_config(body, base, use_cb=use_cb)  # type: ignore[misc]
        if "max_new_tokens" in settings and not any(body.get(name) for name in _MOST_TOKENS):
            config.max_new_tokens = settings["max_new_tokens"]
        if body.get("logit_bias"):
            config.sequence_bias = {(int(token),): float(bias) for token, bias in body["logit_bias"].items()}
        temperature, top_p = body.get("temperature"), body.get("top_p")
        if temperature is not None or top_p is not None:
            config.do_sample = temperature != 0.0
            config.temperature = max(config.temperature or 1.0, _COLDEST)
        if not config.do_sample:  # what only sampling looks at, and warns about
            config.temperature, config.top_p, config.top_k = None, None, None
            config.min_p, config.typical_p = None, None
        try:
            config.validate()
        except ValueError as error:
            raise ApiError(400, f"these settings cannot be used together: {error}") from error
        return config


class Chat(_Sampling, ChatCompletionHandler):
    """`/v1/chat/completions`."""


class Completion(_Sampling, CompletionHandler):
    """`/v1/completions`."""


class Responses(_Sampling, ResponseHandler):
    """`/v1/responses`."""
