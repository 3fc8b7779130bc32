"""What is served: one model, its store, and what is known of everybody who asks."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.cli.serving.model_manager import ModelManager

from ..cache import SparsePrefixCache
from ..config import SparseCacheConfig
from ..store.store import CheckpointStore
from .gate import Line
from .handlers import Chat, Completion, Responses
from .inference import Generation, State
from .model import loaded
from .prometheus import Metrics
from .refusals import ApiError
from .requests import ApiRequest, ChatRequest, CompletionRequest, ResponsesRequest
from .settings import Settings
from .tenants import Tenants
from .tickets import Ticket


@dataclass(frozen=True)
class Endpoint:
    """One of the ways to ask.

    Attributes:
        path: where.
        kind: what its bodies are.
        handler: transformers' handler for it.
        prefix: of the ids of its answers.
        part: what the parts of its streams say they are.
    """

    path: str
    kind: type[ApiRequest]
    handler: Any
    prefix: str = ""
    part: str = ""


class Service:
    """One model, and those who ask it.

    Args:
        manager: holds the model.
        store: where the prefixes are.
        config: of the handles; each request brings its own namespace.
        settings: how clients are treated.
        chat_template_kwargs: for every chat.

    Attributes:
        live: the tickets of the answers that are being worked on.
    """

    def __init__(
        self,
        manager: ModelManager,
        store: CheckpointStore,
        config: SparseCacheConfig,
        settings: Settings,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.manager, self.store, self.config, self.settings = manager, store, config, settings
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.model, self.processor = loaded(manager)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.line = Line(settings.most_waiting)
        self.metrics = Metrics(store, lambda: self.line.inside)
        self.tenants = Tenants(self._handle, settings.most_tenants)
        self.generation = Generation(self.tenants.handle)
        self.tenants.handle("")  # now: what a model is refused for is said before anybody asks
        self._since = int(time.time())
        self.live: dict[str, Ticket] = {}
        state, template = State(self.generation), self.chat_template_kwargs
        chat = Chat(manager, state, template)
        self.endpoints = (
            Endpoint("/v1/chat/completions", ChatRequest, chat, "chatcmpl-", "chat.completion.chunk"),
            Endpoint("/v1/completions", CompletionRequest, Completion(manager, state), "cmpl-", "text_completion"),
            Endpoint("/v1/responses", ResponsesRequest, Responses(manager, state, template)),
        )

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        assert self.manager.force_model is not None
        return str(self.manager.force_model)

    @property
    def model_card(self) -> dict[str, Any]:
        """What clients read of it."""
        owner = "local" if Path(self.model_name).exists() else self.model_name.rpartition("/")[0]
        return {"id": self.model_name, "object": "model", "created": self._since, "owned_by": owner or "local"}

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: It names one.
        """
        if name is not None and name != self.model_name:
            said = f"model {name[:200]!a} is not served here; ask for {self.model_name!r}, or leave it out"
            raise ApiError(404, said, "model", "model_not_found")

    def ended(self, ticket: Ticket) -> None:
        """An answer came to its end."""
        if self.live.pop(ticket.id, None) is not None:
            self.metrics.count(ticket)
            if ticket.started is not None and ticket.ended is not None:
                self.line.took(ticket.ended - ticket.started)

    def stop(self) -> None:
        """Have everything that runs come to its end at the next token or segment."""
        for ticket in list(self.live.values()):
            ticket.cancel(GOING_DOWN)

    def close(self) -> None:
        """Give the model back, and what is stored to the disk tier, where there is one."""
        self.stop()
        self.generation.submit(self.tenants.close).result()
        self.store.close()

    def _handle(self, namespace: str) -> SparsePrefixCache:
        config = replace(self.config, namespace=namespace)
        return SparsePrefixCache(self.model, self.tokenizer, store=self.store, config=config)


GOING_DOWN = "the server is going down"
