"""Where one model's prompts live in a store, which follows from its weights, and whether those have changed."""

from __future__ import annotations

import threading
from typing import Any

from transformers.utils import logging

from ..store.store import CheckpointStore
from . import fingerprint, states
from .binding import Binding
from .layout import Layout
from .weights import Identity, identity, verified


logger = logging.get_logger(__name__)


class Space:
    """The space of one binding in one store, looked up anew for every request.

    Attributes:
        layout: what the states of the model are like, as its weights are.
    """

    def __init__(self, binding: Binding, store: CheckpointStore) -> None:
        self._binding, self._store = binding, store
        self._lock = threading.Lock()
        self._changed, self._names = False, set[str]()
        # A new handle reads the weights anew, because what it finds in a shared store was made with them as they were.
        self._weights, self._name = verified(binding.model), ""
        self.layout = self._fresh_layout()

    def now(self, told: bool = False, found: Identity | None = None) -> tuple[str, bool]:
        """Its name for the weights as they are, or were `found`, and whether they changed since a request was `told`.

        What was stored of weights that are gone is dropped. What was stored under other settings, such as another
        adapter, stays, since they may come back.
        """
        weights = identity(self._binding.model) if found is None else found
        with self._lock:
            before, self._weights = self._weights, weights
            old, self._name = self._name, self._name_for(weights)
            new = self._name
            if new != old:  # of other weights, or under another autocast
                self.layout = self._fresh_layout()
            changed = self._changed or str(before) != str(weights)
            self._changed = changed and not told
            gone = self._names if before.weights != weights.weights else set()
            self._names = {new, *(self._names - gone)}
        self._store.expect(new, self.layout)
        if before.weights != weights.weights:
            for name in gone - {new}:
                self._store.drop(name)
            logger.warning_once("The model's weights changed: what SparsePrefixCache had stored of it was dropped.")
        return new, changed

    def latest(self) -> str:
        """The space of the latest prompt. Unlike `now` it notices nothing, and it never reads all weights."""
        if self._name or self._store.outlives_process:
            return self._name
        return self._name_for(identity(self._binding.model))

    def after_fork(self) -> None:
        """In a child process: with a lock of its own."""
        self._lock = threading.Lock()

    def _fresh_layout(self) -> Layout:
        binding = self._binding

        def probe() -> tuple[Any, Any]:
            cache = binding.live_cache()
            return cache, states.probe(binding.model, cache, binding.cache_name)

        return Layout(probe, binding.rounding)

    def _name_for(self, weights: Identity) -> str:
        return fingerprint.space_of(self._binding, weights, durable=self._store.outlives_process)
