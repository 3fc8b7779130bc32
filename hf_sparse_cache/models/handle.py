"""A `transformers.Cache` that can be handed to `generate()` but holds no request's state: what every handle is.

Whatever a model or a copy would do with it as with an ordinary cache is refused, with the remedy in the message.
"""

from typing import Any

from transformers.cache_utils import Cache

from .attachment import Attachment
from .server import Server


class Handle(Cache):
    """An empty cache that refuses to be filled, copied or pickled, and knows who serves the requests it is given to.

    Attributes:
        server: serves them.
    """

    def __init__(self, server: Server, attachment: Attachment) -> None:
        super().__init__(layers=[])
        self.server = server
        self._attachment = attachment

    def check_call(self, model: Any) -> None:
        """Refuse a call of a model other than the handle's own, and a detached handle.

        Raises:
            ValueError: Names both models, or says that the handle was detached.
        """
        own = self.server.binding.model
        if model is not own:
            raise ValueError(
                f"past_key_values is a SparsePrefixCache made for another model ({type(own).__name__} object "
                f"{id(own):#x}, not {type(model).__name__} object {id(model):#x}). Make one with "
                "SparsePrefixCache(model) for each model; they may share a store."
            )
        if not self._attachment.alive:
            raise ValueError(
                "past_key_values is a SparsePrefixCache that was detached. Make a new one, with its store."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: a request begins with a live cache of its own."""
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

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse()

    update_conv_state = update_recurrent_state = update_indexer = get_mask_sizes = has_previous_state = update

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
