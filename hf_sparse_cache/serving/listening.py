"""A service on a port, from its start to a clean end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import uvicorn

from .app import application
from .service import Service


# For requests that are ended to say so.
_LAST_SECONDS = 10


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        drain: seconds that running requests have to end in once it is told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0


class PortServer(uvicorn.Server):
    """Told to stop, it takes nobody in, lets running requests end for `drain` seconds, ends the others, and flushes.

    Args:
        service: answers.
        address: where.
        log_level: of the access log; "warning" for none.
    """

    def __init__(self, service: Service, address: Address, log_level: str = "warning") -> None:
        self._service, self._drain = service, address.drain
        super().__init__(
            uvicorn.Config(
                application(service),
                host=address.host,
                port=address.port,
                log_level=log_level,
                timeout_graceful_shutdown=round(address.drain) + _LAST_SECONDS,
                server_header=False,
            )
        )

    async def shutdown(self, sockets: Any = None) -> None:
        """Take nobody in, and let those inside end; who takes too long is told so."""
        asyncio.get_running_loop().call_later(self._drain, self._service.stop)
        await super().shutdown(sockets)
