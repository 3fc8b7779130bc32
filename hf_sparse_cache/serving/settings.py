"""What an operator decides."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field


LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Settings:
    """How a server treats its clients.

    Attributes:
        api_keys: the keys that are let in, and the name of each one's tenant; empty for an open server.
        admin_key: opens what only operators may see and do; "" leaves that to clients on the same machine, and to
            nobody where there are API keys.
        most_waiting: requests that may wait for the model; one more is told to come back.
        timeout: seconds from arrival to the last byte; None for no end.
        most_body_bytes: of a request.
        most_tenants: how many namespaces are kept at hand; the others' prefixes stay stored.
    """

    api_keys: Mapping[str, str] = field(default_factory=dict)
    admin_key: str = ""
    most_waiting: int = 64
    timeout: float | None = 600.0
    most_body_bytes: int = 16 * 2**20
    most_tenants: int = 256

    def __post_init__(self) -> None:
        for name in ("most_waiting", "most_body_bytes", "most_tenants"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; give seconds, or None for no end")
        if any(not key.isascii() or not key.strip() for key in (*self.api_keys, self.admin_key or "-")):
            raise ValueError("an API key is empty or not plain ASCII, so that no header can carry it")
        if self.admin_key in self.api_keys:
            raise ValueError("the admin key is a client's key, too; give operators one of their own")


def salted_namespace(tenant: str, salt: str) -> str:
    """The namespace of a tenant's requests with one salt. No two pairs share one, whatever they are called.

    Args:
        tenant: "" on an open server.
        salt: `cache_salt` of the request, "" for none.
    """
    if not salt:
        return tenant
    digest = hashlib.blake2b(salt.encode(), digest_size=16, person=b"cache_salt").hexdigest()
    return f"{tenant}#{digest}"
