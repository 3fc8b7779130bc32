"""Servers for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import served as tools

from hf_sparse_cache.serving.model import Loading


@pytest.fixture(scope="session")
def manager() -> Any:
    """The model, loaded once."""
    return Loading(tools.NAME, learn_from=tools.WORDS).manager()


@pytest.fixture
def start(manager: Any) -> Iterator[Callable[..., tools.Running]]:
    """Starts servers, which end with the test."""
    running: list[tools.Running] = []

    def one(*args: Any, **settings: Any) -> tools.Running:
        running.append(tools.start(manager, *args, **settings))
        return running[-1]

    yield one
    for server in running:
        tools.stop(server)


@pytest.fixture(scope="module")
def served(manager: Any) -> Iterator[tools.Running]:
    """An open server, for the tests of one module."""
    server = tools.start(manager)
    yield server
    tools.stop(server)
