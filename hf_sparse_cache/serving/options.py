"""Everything an operator says of a server, checked, and the service that comes of it: for the command and for Ray."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..config import SparseCacheConfig
from ..routing.router import Rules
from ..stats import parse_bytes
from ..store.store import CheckpointStore
from .model import Loading
from .service import Service
from .settings import Settings


def _words(given: Any) -> Any:
    """Several values may be given as one text, as on the command line of `serve run`."""
    return tuple(given.split()) if isinstance(given, str) else given


def _object(given: Any) -> Any:
    return json.loads(given) if isinstance(given, str) else given


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
_KEYS, _ADMIN_KEY = "HF_SPARSE_CACHE_API_KEYS", "HF_SPARSE_CACHE_ADMIN_KEY"


class Options(BaseModel):
    """One server: its model, its store, and how it treats its clients.

    Attributes:
        model: built-in model, folder or Hub id.
        device, dtype, attn_implementation, quantization, trust_remote_code: as transformers' server takes them.
        chat_template: a file in place of the model's own template.
        chat_template_kwargs: for every chat.
        learn_from: text from which the tokenizer of a built-in model learns.
        max_memory: of prefixes beside the model.
        host_memory, disk_memory, disk_dir, shared, shared_memory: the other tiers, as `CheckpointStore` takes them.
        exactness, storage, policy, grid, cut_after: as `SparseCacheConfig` takes them.
        pieces: most tokens read at once, in replayable mode.
        api_keys: NAME=KEY of each tenant; default the words of the environment variable HF_SPARSE_CACHE_API_KEYS.
        admin_key: opens what only operators may see and do; default HF_SPARSE_CACHE_ADMIN_KEY.
        tenant_memory: NAME=SIZE, the share of `max_memory` that a tenant may take.
        most_waiting, timeout, max_body: see `Settings`; a timeout of 0 is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    quantization: str | None = None
    trust_remote_code: bool = False
    chat_template: Path | None = None
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_object)] = {}
    learn_from: str = ""
    max_memory: str = "2GiB"
    host_memory: str | None = None
    disk_memory: str | None = None
    disk_dir: Path | None = None
    shared: str | None = None
    shared_memory: str | None = "100GiB"
    exactness: str = "replayable"
    storage: str = "exact"
    policy: str = "learned"
    grid: int | None = None
    pieces: int = 1024
    cut_after: Words = ()
    api_keys: Words = Field(default_factory=lambda: tuple(os.environ.get(_KEYS, "").split()))
    admin_key: str = Field(default_factory=lambda: os.environ.get(_ADMIN_KEY, ""))
    tenant_memory: Words = ()
    most_waiting: int = 64
    timeout: float = 600.0
    max_body: str = "16MiB"

    @model_validator(mode="after")
    def _shares_are_tenants(self) -> Self:
        names = {name for name, _ in pairs("api_keys", self.api_keys, several=True)}
        unknown = [name for name, _ in pairs("tenant_memory", self.tenant_memory) if name not in names]
        if unknown:
            raise ValueError(f"tenant_memory names {unknown[0]!r}, which no API key names; give its key, too")
        return self

    def settings(self) -> Settings:
        """How clients are treated."""
        tenants = {key: name for name, key in pairs("api_keys", self.api_keys, several=True)}
        size = parse_bytes(self.max_body, "max_body") or 0
        return Settings(tenants, self.admin_key, self.most_waiting, self.timeout or None, size)

    def loading(self) -> Loading:
        """How the model is loaded."""
        return Loading(
            self.model,
            self.device,
            self.dtype,
            self.attn_implementation,
            self.quantization,
            self.trust_remote_code,
            self.chat_template,
            self.learn_from,
        )

    def service(self) -> Service:
        """The server, with its model loaded.

        Raises:
            ValueError, OSError: Something cannot be as it is given; names it.
        """
        settings = self.settings()
        config = SparseCacheConfig(
            self.max_memory,
            exactness=self.exactness,
            storage=self.storage,
            policy=self.policy,
            grid=self.grid,
            cut_after=self.cut_after,
            pieces=self.pieces if self.exactness == "replayable" else None,
        )
        store = CheckpointStore(
            self.max_memory,
            namespace_memory=dict(pairs("tenant_memory", self.tenant_memory)),
            host_memory=self.host_memory,
            disk_memory=self.disk_memory,
            disk_dir=self.disk_dir,
            shared=self.shared,
            shared_memory=self.shared_memory,
        )
        return Service(self.loading().manager(), store, config, settings, dict(self.chat_template_kwargs))


class RayOptions(Options):
    """A server of several replicas: `Options` of each, and how they stand together.

    Attributes:
        replicas: how many; the least of them with `most_replicas`.
        most_replicas: where Ray may start more as requests wait; None for no more.
        cpus, gpus: that each replica asks of Ray.
        fronts: processes that read requests and prompts.
        router: "prefix"; "round_robin" is for comparing.
        most_ahead, most_share, least_tokens: see `Rules`.
        publish_seconds: how often each replica says what it stores.
        drain: seconds that running requests have to end in where a replica is stopped.
    """

    replicas: int = Field(default=2, ge=1)
    most_replicas: int | None = Field(default=None, ge=1)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    fronts: int = Field(default=1, ge=1)
    router: Literal["prefix", "round_robin"] = "prefix"
    most_ahead: int = Field(default=Rules.most_ahead, ge=0)
    most_share: float = Field(default=Rules.most_share, ge=1)
    least_tokens: int = Field(default=Rules.least_tokens, ge=1)
    publish_seconds: float = Field(default=2.0, gt=0)
    drain: float = Field(default=30.0, ge=0)

    def of_each(self) -> Options:
        """What concerns one replica: as long as it stays the same, Ray scales without starting any anew."""
        return Options(**{name: getattr(self, name) for name in Options.model_fields})


def pairs(option: str, given: Iterable[str], several: bool = False) -> list[tuple[str, str]]:
    """NAME=VALUE, each in two.

    Args:
        option: what was given them, for messages.
        given: the texts.
        several: whether a name may come more than once, as that of a tenant of several keys.

    Raises:
        ValueError: one is nothing of the kind, or a name comes twice.
    """
    found: list[tuple[str, str]] = []
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option} is {'given' if not equals else 'empty'} without a name: write NAME=VALUE")
        if name in dict(found) and not several:
            raise ValueError(f"{option} names {name!r} twice; give it once")
        found.append((name, value))
    return found
