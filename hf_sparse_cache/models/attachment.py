"""Methods of one model object, replaced while handles are attached to it, and given back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from ..forks import ForkSafeLock
from . import mamba1


# Called with the model, the model's own method, and the call's arguments.
Replacement = Callable[..., Any]
_lock = ForkSafeLock()
# id(model) -> attachments to it; the entry goes with the last one, before the model can.
_attached: dict[int, int] = {}


class Override:
    """A method of one model object, replaced. Copies of the model get a copy bound to them, not to the original."""

    def __init__(self, model: Any, name: str, replacement: Replacement) -> None:
        self._model = weakref.ref(model)
        self._name, self._replacement = name, replacement
        # Another library may have replaced the method on this object before us.
        previous = model.__dict__.get(name)
        # A copy of an attached model carries a copied override, which has no handle to serve.
        self._previous: Callable[..., Any] | None = previous._previous if isinstance(previous, Override) else previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        own = self._previous or getattr(type(model), self._name).__get__(model)
        return self._replacement(model, own, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Override:
        model = memo.get(id(self._model()), self._model())
        copied = Override.__new__(Override)
        copied.__dict__.update(self.__dict__, _model=weakref.ref(model))
        return copied

    def __reduce__(self) -> Any:
        raise TypeError(
            "This model has a SparsePrefixCache attached; call cache.detach() before pickling it or torch.save."
        )

    def give_back(self) -> None:
        """Put back what was there before."""
        model = self._model()
        if model is None or model.__dict__.get(self._name) is not self:
            return
        if self._previous is None:
            del model.__dict__[self._name]
        else:
            model.__dict__[self._name] = self._previous


class Attachment:
    """The overrides on one model object, from `make` until `end`. Handles on the same model share them.

    Args:
        model: the model object. The Mamba-1 scan of its layers is held as well.
        replacements: by the name of the method.
    """

    def __init__(self, model: Any, replacements: Mapping[str, Replacement]) -> None:
        self._model, self._replacements = model, replacements
        self._scan = mamba1.Scan(model)
        self.alive = False

    def make(self) -> None:
        """Override the methods, unless another attachment has done so."""
        with _lock:
            if _attached.get(id(self._model), 0) == 0:
                for name, replacement in self._replacements.items():
                    self._model.__dict__[name] = Override(self._model, name, replacement)
            _attached[id(self._model)] = _attached.get(id(self._model), 0) + 1
        self._scan.hold()
        self.alive = True

    def end(self) -> None:
        """Give the model its own methods back once the last attachment has ended."""
        if not self.alive:
            return
        self.alive = False
        with _lock:
            _attached[id(self._model)] -= 1
            if _attached[id(self._model)] == 0:
                del _attached[id(self._model)]
                for name in self._replacements:
                    override = self._model.__dict__.get(name)
                    if isinstance(override, Override):
                        override.give_back()
        self._scan.release()
