"""The application: what answers where."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.utils import logging

from . import gate
from .admin import Admin
from .answering import respond
from .overview import overview_page
from .refusals import ApiError
from .service import Endpoint, Service


logger = logging.get_logger(__name__)
REQUEST_ID = b"x-request-id"


def application(service: Service) -> FastAPI:
    """The application of a service, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Framed)
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _not_there)
    for endpoint in service.endpoints:
        app.add_api_route(endpoint.path, _asks(service, endpoint), methods=["POST"], response_model=None)
    _looks(app, service)
    admin = Admin(service)
    for name, work in admin.verbs.items():
        app.add_api_route(f"/cache/{name}", work, methods=["POST"], response_model=None)
    return app


def _asks(service: Service, endpoint: Endpoint) -> Any:
    async def asked(request: Request) -> Response:
        return await respond(service, endpoint, request)

    return asked


def _looks(app: FastAPI, service: Service) -> None:
    """What can be looked at."""

    @app.get("/v1/models")
    def models(request: Request) -> JSONResponse:
        gate.tenant_of(request, service.settings)
        return JSONResponse({"object": "list", "data": [service.model_card]})

    @app.get("/v1/models/{name:path}")
    def model(request: Request, name: str) -> JSONResponse:
        gate.tenant_of(request, service.settings)
        service.check_model(name)
        return JSONResponse(service.model_card)

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse({"status": "ok", "model": service.model_name, "requests": service.line.inside})

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    def overview(request: Request, every: str = "") -> Response:
        gate.require_admin(request, service.settings)
        seconds = min(3600, int(every)) if every.isascii() and every.isdecimal() and len(every) < 6 else 0
        html = overview_page(service, seconds or None)
        return Response(html, media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)


# The page holds what clients wrote: nothing of it may run, or be framed.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


async def _told(request: Request, error: Any) -> Response:
    return error.response()  # type: ignore[no-any-return]


async def _not_there(request: Request, error: Any) -> Response:
    said = {
        404: f"{request.url.path} is not an endpoint of this server",
        405: f"{request.method} is not for this path",
    }
    message = said.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, ascii(message)[1:-1], headers=error.headers).response()


class _Framed:
    """Gives every answer the id that its request came with, or one of its own, and every failure an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(REQUEST_ID, b"")
        name = given if given.isascii() and 0 < len(given) <= 200 else uuid.uuid4().hex.encode()
        begun = False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message["headers"], (REQUEST_ID, name)]}
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception as error:
            logger.error(f"A request to {scope['path']!a} failed", exc_info=error)
            if not begun:
                said = f"the server failed: {type(error).__name__}; its log says more"
                await ApiError(500, said).response()(scope, receive, named)
