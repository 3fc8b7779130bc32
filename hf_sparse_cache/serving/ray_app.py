"""Replicas behind a prefix router, on Ray Serve: `serve run hf_sparse_cache.serving.ray_app:build model=...`

A **front** reads each request and the tokens of its prompt, and hands it to the replica that the router chooses; a
**replica** is the server of `hf-sparse-cache serve` with a model and a store of its own. Where a replica dies, what it
was asked is asked of another.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message
from transformers.utils import logging

from ..routing.digest import Publisher
from ..routing.names import Keys, Names
from . import gate
from .app import application
from .options import Options, RayOptions
from .prompts import PromptReader
from .ray_router import PrefixRequestRouter
from .refusals import ApiError
from .relay import Destination, HttpCall, Relayed, WholeAnswer, joint_response, messages
from .settings import Settings


logger = logging.get_logger(__name__)
# Entries of a digest: Ray's controller carries it, and looks at it many times a second.
_MOST_ENTRIES = 4096
_BY_PROMPT = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/cache/prefill", "/cache/explain",
)  # fmt: skip
_TO_ALL = ("/cache/mark", "/cache/clear", "/metrics")
_SESSION = "x-session-id"


def build(args: RayOptions | dict[str, Any]) -> Application:
    """The application of a fleet, for `serve run`, a config file of Ray Serve, or `serve.run`.

    Args:
        args: a `RayOptions`, or its fields by name, as Ray's commands give them.

    Raises:
        ValueError: one of them cannot be; names it.
    """
    if not isinstance(args, RayOptions):
        args = RayOptions(**args)
    router = RequestRouterConfig(
        request_router_class=PrefixRequestRouter,
        request_router_kwargs={
            "rules": {name: getattr(args, name) for name in ("most_ahead", "most_share", "least_tokens")},
            "router": args.router,
        },
        request_routing_stats_period_s=args.publish_seconds,
    )
    scaling: dict[str, Any] = {"num_replicas": args.replicas}
    if args.most_replicas is not None:
        limits = {"min_replicas": args.replicas, "max_replicas": max(args.replicas, args.most_replicas)}
        scaling = {"autoscaling_config": limits}
    replica = serve.deployment(
        Replica,
        # Above what its own line takes, which says when to come back.
        max_ongoing_requests=args.most_waiting + 16,
        request_router_config=router,
        graceful_shutdown_timeout_s=args.drain + 10,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        **scaling,
    )
    front = serve.deployment(
        Front,
        num_replicas=args.fronts,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=args.drain + 20,
    )
    options = args.of_each()
    return front.bind(options, replica.bind(options))


def _keys(options: Options) -> Keys:
    """The same for all processes of an application, however often it is deployed. They stay within the cluster."""
    said = json.dumps([options.model, options.api_keys, options.admin_key])
    return Keys(hashlib.blake2b(said.encode()).digest())


class Replica:
    """One model with its store, and the application of `hf-sparse-cache serve` over both.

    Args:
        options: say which.
    """

    def __init__(self, options: Options) -> None:
        self._service = options.service()
        self._app = application(self._service)
        self._publisher = Publisher(self._service.store, _keys(options), _MOST_ENTRIES)
        self._running: set[asyncio.Task[None]] = set()

    async def answer(self, call: HttpCall, way: Destination) -> AsyncIterator[Message]:
        """A request, answered in the messages of ASGI."""
        async for message in messages(self._app, call, self._running):
            yield message

    async def whole(self, call: HttpCall) -> list[Message]:
        """The same at once."""
        return [message async for message in messages(self._app, call, self._running)]

    def record_routing_stats(self) -> dict[str, Any]:
        """What Ray brings to the routers: which prefixes are stored here, by names that tell no token."""
        return {"prefixes": self._publisher.digest().to_bytes()}

    async def __del__(self) -> None:
        """Ray is done with it: what only memory holds goes to the shared store, where there is one."""
        await asyncio.to_thread(self._service.close)


class Front:
    """Takes requests in, reads their prompts, and hands them to replicas.

    Args:
        options: whose clients they are.
        replicas: who answers.
    """

    def __init__(self, options: Options, replicas: DeploymentHandle[Any]) -> None:
        self._settings: Settings = options.settings()
        self._keys = _keys(options)
        self._prompts = PromptReader(options.loading().processor(), dict(options.chat_template_kwargs))
        self._replicas = replicas
        self._answers = replicas.answer.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """One request."""
        try:
            body = await gate.bytes_of(request, self._settings)
        except ApiError as error:
            return error.response()
        client = request.client
        call = HttpCall(
            request.method,
            request.scope["path"],
            request.scope["query_string"],
            tuple(request.scope["headers"]),
            body,
            None if client is None else (client.host, client.port),
        )
        if call.path in _TO_ALL:
            return await self._all(call)
        way = Destination()
        if call.method == "POST" and call.path in _BY_PROMPT:
            way = await asyncio.to_thread(self._way, request, call)
        return Relayed(lambda: self._asked(call, way), RayActorError, call.path)

    def _way(self, request: Request, call: HttpCall) -> Destination:
        """Where a request wants to go. What is wrong with it is for the replica to say."""
        try:
            tenant = "" if call.path.startswith("/cache/") else gate.tenant_of(request, self._settings)
            namespace, ids, session = self._prompts.read(call.path, call.body, tenant)
        except Exception as error:
            logger.info(f"The prompt of a request is not known to the router: {type(error).__name__}")
            return Destination()
        session = request.headers.get(_SESSION, session)
        named = self._keys.session(namespace, session) if session else None
        return Destination(Names(self._keys, namespace, ids), named)

    async def _asked(self, call: HttpCall, way: Destination) -> AsyncIterator[Message]:
        """The messages of one replica.

        Raises:
            RayActorError: It died, or cannot be reached.
        """
        answers = self._answers.remote(call, way)
        try:
            async for message in answers:
                yield message
        finally:
            answers.cancel()

    async def _all(self, call: HttpCall) -> Response:
        """Every replica is asked, and what they say put together."""
        found = await asyncio.to_thread(self._replicas.broadcast("whole", call).results)
        return joint_response(call.path, [WholeAnswer.of(said) for said in found])
