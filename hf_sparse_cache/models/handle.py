"""A `transformers.Cache` that can be handed to `generate()` but holds no request's state: what every handle is.

Whatever a model or a copy would do with it as with an ordinary cache is refused, with the remedy in the message.
"""

from typing import Any, NoReturn

from transformers.cache_utils import Cache

from .attachment import Attachment
from .server import Server


class _HandleType(type):
    """The class of handle classes: one that is given in place of an object is refused before it is changed."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name == "_is_user_defined":  # generate() marks what it is given
            refuse_class()
        super().__setattr__(name, value)


class Handle(Cache, metaclass=_HandleType):
    """An empty cache that refuses to be filled, copied or pickled, and knows who serves the requests it is given to.

    Attributes:
        server: serves them.
    """

    def __init__(self, server: Server, attachment: Attachment) -> None:
        super().__init__(layers=[])
        self.server = server
        self._attachment = attachment

    def __bool__(self) -> bool:
        """Always true: an empty cache is false, and `cache if cache else None` would switch it off in silence."""
        return True

    def check_call(self, model: Any, name: str) -> None:
        """Refuse a call of a model other than the handle's own, and a detached handle, given as the argument `name`.

        Raises:
            ValueError: Names both models, or says that the handle was detached.
        """
        own = self.server.binding.model
        if model is not own:
            raise ValueError(
                f"{name} is a SparsePrefixCache made for another model ({type(own).__name__} object "
                f"{id(own):#x}, not {type(model).__name__} object {id(model):#x}). Make one with "
                "SparsePrefixCache(model) for each model; they may share a store."
            )
        if not self._attachment.alive:
            raise ValueError(f"{name} is a SparsePrefixCache that was detached. Make a new one, with its store.")

    def serves(self, model: Any) -> bool:
        """Whether calls of a model may be given this handle."""
        return model is self.server.binding.model and self._attachment.alive

    def get_seq_length(self: Any = None, layer_idx: int = 0) -> int:
        """Always 0: a request begins with a live cache of its own."""
        if not isinstance(self, Handle):
            refuse_class()
        return 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        # generate() marks the cache that it is about to use as it is, so this model has no overrides for the handle.
        self._refuse()

    def update(self: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Handle):
            refuse_class()
        self._refuse()

    update_conv_state = update_recurrent_state = update_indexer = get_mask_sizes = has_previous_state = update
    get_conv_state = get_recurrent_state = update

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copy.copy, copy.deepcopy, pickle and torch.save all come here.
        raise TypeError(
            "A SparsePrefixCache cannot be copied or pickled, and generate() never changes the one it is given: pass "
            "the same handle to every call. For another model make SparsePrefixCache(model, store=cache.store)."
        )

    def _refuse(self) -> None:
        state = "is attached to" if self._attachment.alive else "was detached from"
        raise ValueError(
            f"past_key_values is a SparsePrefixCache that {state} a {type(self.server.binding.model).__name__} object"
            ", and only that model's generate() can use it. Make one with SparsePrefixCache(model) for the model you "
            "call."
        )


def refuse_class(name: str = "past_key_values") -> NoReturn:
    """Refuse the class where an object is needed.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{name} is the class SparsePrefixCache, not an object of it: make one with SparsePrefixCache(model)."
    )
