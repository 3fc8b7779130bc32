"""One call of `generate()` that was given a handle, from its start to its end."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache


@dataclass(eq=False)
class Call:
    """One call, whichever way transformers takes through it.

    Attributes:
        handle: what it was given.
        ids: its prompts as they were given, `(batch, width)`; None where that was not as ids.
        mask: the mask that came with them.
        own_loop: whether a loop of the caller's own (`custom_generate`) runs the prompt.
        outer: the call inside of which it was made, in the same thread.
        counted: whether its prompts are in the handle's statistics. A call that makes others inside of itself, for the
            same handle, is counted with them.
        decodes: whether it decodes one token after the other, in transformers' own loop.
        turn: what the answer to its one prompt goes on from (see `answers`); None where nothing may be kept.
    """

    handle: Cache
    ids: torch.Tensor | None = None
    mask: Any = None
    own_loop: bool = False
    outer: Call | None = None
    counted: bool = False
    decodes: bool = False
    turn: Any = None

    @property
    def given(self) -> int:
        """How many prompts it was given; 0 where they were not given as ids."""
        return 0 if self.ids is None else len(self.ids)

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """Of each of its prompts, less its padding, for which the host waits; empty where it has no ids."""
        return () if self.ids is None else row_lengths(self.ids, self.mask)

    def count(self) -> None:
        """Note that this call, and those around it, are in the handle's statistics."""
        call: Call | None = self
        while call is not None:
            call.counted = call.counted or call.handle is self.handle
            call = call.outer


class _Thread(threading.local):
    innermost: Call | None = None


_thread = _Thread()


@contextmanager
def opened(call: Call) -> Iterator[Call]:
    """Make a call the innermost one of this thread."""
    call.outer = _thread.innermost
    _thread.innermost = call
    try:
        yield call
    finally:
        _thread.innermost = call.outer


def innermost(handle: Cache) -> Call | None:
    """The innermost call of this thread, if it was given this handle."""
    call = _thread.innermost
    return call if call is not None and call.handle is handle else None


def prompts_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor | None, Any]:
    """The prompts that `generate(*args, **kwargs)` is given as ids, if it is, and their mask."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids"))]
    return next((value for value in given if torch.is_tensor(value) and value.dim() == 2), None), kwargs.get(
        "attention_mask"
    )


def row_lengths(ids: torch.Tensor, attention_mask: Any = None) -> tuple[int, ...]:
    """Tokens of each row of `ids` `(batch, width)`, less those that a mask of the same shape leaves out."""
    if torch.is_tensor(attention_mask) and attention_mask.shape == ids.shape:
        return tuple((attention_mask != 0).sum(-1).tolist())
    return (ids.shape[1],) * ids.shape[0]
