"""Who may come in, with what, and when there is room."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request

from .refusals import ApiError
from .settings import LOOPBACK, Settings


_DEEPEST = 64


class Line:
    """The requests that wait for the model or are on it: so many, and no more.

    Args:
        most: how many may wait beside the one that runs.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.inside = 0
        self._usual_seconds = 1.0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in it.

        Raises:
            ApiError: There is none; says when to come back.
        """
        if self.inside > self._most:
            seconds = max(1, min(600, round(self._usual_seconds * self.inside)))
            raise ApiError(
                429,
                f"{self.inside} requests wait already; come back in {seconds} seconds",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def took(self, seconds: float) -> None:
        """Learn how long one request keeps the model."""
        self._usual_seconds += 0.1 * (seconds - self._usual_seconds)


def tenant_of(request: Request, settings: Settings) -> str:
    """Whose key a request carries.

    Raises:
        ApiError: It carries none that is known.
    """
    if not settings.api_keys:
        return ""
    given = _key_in(request)
    found = None
    for key, tenant in settings.api_keys.items():  # all of them, so that time tells nothing
        if hmac.compare_digest(given.encode(), key.encode()):
            found = tenant
    if found is None:
        said = "the API key is not known here" if given else "an API key is needed: Authorization: Bearer KEY"
        raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    return found


def require_admin(request: Request, settings: Settings) -> None:
    """Let operators pass.

    Raises:
        ApiError: It is somebody else.
    """
    if settings.admin_key:
        if hmac.compare_digest(_key_in(request).encode(), settings.admin_key.encode()):
            return
        # So that a browser asks for it: any name, and the key as password.
        raise ApiError(
            401,
            "this is for operators: Authorization: Bearer ADMIN_KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Basic realm="operators"'},
        )
    near = request.client is not None and request.client.host in LOOPBACK
    # A page of somebody else's in a browser on this machine is near, too, but says where it comes from.
    if settings.api_keys or not near or not _own_origin(request):
        raise ApiError(403, "this is for operators: start the server with an admin key", code="admin_only")


def _own_origin(request: Request) -> bool:
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    return name.strip("[]") in LOOPBACK and (origin is None or origin.partition("://")[2] == host)


def _key_in(request: Request) -> str:
    """The bearer token, or the password that a browser sends; "" for none."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("latin-1").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


async def body_of(request: Request, settings: Settings) -> Any:
    """The JSON of a request, read no further than the limit.

    Raises:
        ApiError: It is too long, of another type or encoding, no JSON, or did not arrive in time.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"content-type is {_shown(kind)}; send application/json", code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ApiError(
            415, f"content-encoding is {_shown(coding)}; send the body as it is", code="unsupported_media_type"
        )
    data = await bytes_of(request, settings)
    try:
        found = json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)
        _check_depth(found)
    except (UnicodeDecodeError, ValueError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    return found


async def bytes_of(request: Request, settings: Settings) -> bytes:
    """The body of a request, read no further than the limit.

    Raises:
        ApiError: It is too long, or did not arrive in time.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(settings.timeout):
            async for part in request.stream():
                size += len(part)
                if size > settings.most_body_bytes:
                    said = (
                        f"the body has more than {settings.most_body_bytes:,} bytes, the most that this server takes"
                    )
                    raise ApiError(413, said, code="body_too_large", headers={"Connection": "close"})
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the body ends early") from None
    return b"".join(parts)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(found: Any) -> None:
    """Refuse what is nested so deeply that those who walk it would fail."""
    level, depth = [found], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise RecursionError
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [value for values in inner for value in values]


def _shown(value: str) -> str:
    return ascii(value[:80])
