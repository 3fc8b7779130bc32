"""Methods of one model object, replaced while handles are attached to it, and given back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ..forks import ForkSafeLock
from . import mamba1


# Called with the model, the model's own method, and the call's arguments.
Replacement = Callable[..., Any]
# As torch calls it before a forward, with keywords; and after one.
Hook = Callable[[Any, Any, dict[str, Any]], Any]
After = Callable[[Any, Any, dict[str, Any], Any], None]


@dataclass(frozen=True)
class Hooks:
    """What is called around forwards: before each one of the model and of its body, before and after the body's."""

    before_forward: Hook
    before_body: Hook
    after_body: After


_lock = ForkSafeLock()
# id(model) -> what is replaced on it; the entry goes with the last attachment, before the model can.
_patches: dict[int, _Patch] = {}


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
        return self._replacement(model, self._own(model), *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The model's own method, whose signature this one has for those who ask."""
        return self._own(self._model())

    def __deepcopy__(self, memo: dict[int, Any]) -> Override:
        model = memo.get(id(self._model()), self._model())
        copied = Override.__new__(Override)
        copied.__dict__.update(self.__dict__, _model=weakref.ref(model))
        return copied

    def __reduce__(self) -> Any:
        raise TypeError(
            "This model has a SparsePrefixCache attached; call cache.detach() before pickling it or torch.save."
        )

    def _own(self, model: Any) -> Any:
        return self._previous or getattr(type(model), self._name).__get__(model)

    def give_back(self) -> None:
        """Put back what was there before."""
        model = self._model()
        if model is None or model.__dict__.get(self._name) is not self:
            return
        if self._previous is None:
            del model.__dict__[self._name]
        else:
            model.__dict__[self._name] = self._previous


class _Patch:
    """The overrides and the hooks on one model object, shared by its attachments. Made whole or not at all."""

    def __init__(self, model: Any, replacements: Mapping[str, Replacement], hooks: Hooks) -> None:
        self.users = 0
        with ExitStack() as undo:
            for name, replacement in replacements.items():
                override = Override(model, name, replacement)
                undo.callback(override.give_back)
                model.__dict__[name] = override
            # Its body as well: PEFT calls the model's forward without what is around it, and users the body alone.
            for module in dict.fromkeys((model, model.base_model)):
                hook = module.register_forward_pre_hook(hooks.before_forward, with_kwargs=True)
                undo.callback(hook.remove)
            body = model.base_model
            undo.callback(body.register_forward_pre_hook(hooks.before_body, with_kwargs=True).remove)
            undo.callback(body.register_forward_hook(hooks.after_body, with_kwargs=True).remove)
            self._undo = undo.pop_all()

    def end(self) -> None:
        """Give the model its own methods back."""
        self._undo.close()


class Attachment:
    """What is replaced on one model object, from `make` until `end`. Handles on the same model share it.

    Args:
        model: the model object. The Mamba-1 scan of its layers is held as well.
        replacements: methods, by name.
        hooks: called around its forwards.
    """

    def __init__(self, model: Any, replacements: Mapping[str, Replacement], hooks: Hooks) -> None:
        self._model, self._replacements, self._hooks = model, replacements, hooks
        self._scan = mamba1.Scan(model)
        self._undo = ExitStack()
        self.alive = False

    def make(self) -> None:
        """Replace everything, unless another attachment has done so; or nothing, when that fails."""
        try:
            self._scan.hold()
            self._undo.callback(self._scan.release)
            with _lock:
                patch = _patches.get(id(self._model))
                if patch is None:
                    patch = _Patch(self._model, self._replacements, self._hooks)
                    _patches[id(self._model)] = patch
                patch.users += 1
                self._undo.callback(self._leave, patch)
            self.alive = True
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Give the model back what is its own once the last attachment has ended."""
        self.alive = False
        self._undo.close()

    def _leave(self, patch: _Patch) -> None:
        with _lock:
            patch.users -= 1
            if patch.users == 0:
                del _patches[id(self._model)]
                patch.end()
