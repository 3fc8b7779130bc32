"""Asking a policy, which may be a user's own: what is not a policy, or not an answer, is said in one clear line."""

from __future__ import annotations

import operator
from typing import Any

from .policies import Policy
from .policy import Prompt


_RIGHT = "give a name such as 'learned', or an object of a class that inherits hf_sparse_cache.policies.Policy"


def check_policy(policy: Any) -> None:
    """Refuse what can never place anything, before the first request.

    Raises:
        TypeError: it is a class, no `Policy`, has no `place`, or was not initialised as one.
    """
    if isinstance(policy, type):
        raise TypeError(f"policy is the class {policy.__name__}: give an object of it, policy={policy.__name__}()")
    kind = type(policy).__name__
    if not isinstance(policy, Policy):
        raise TypeError(f"policy is {policy!r} ({kind}): {_RIGHT}")
    if getattr(policy.place, "__func__", None) is Policy.place:
        raise TypeError(f"policy is a {kind}, which has no place: add place(self, prompt), which returns positions")
    if not hasattr(policy, "lock"):
        raise TypeError(f"policy is a {kind}, whose __init__ leaves out super().__init__(): call it there")


def placed(policy: Policy, prompt: Prompt) -> list[int]:
    """What a policy places.

    Raises:
        TypeError: it is no list of whole numbers.
    """
    found: Any = policy.place(prompt)
    try:
        return [operator.index(position) for position in found]
    except TypeError:
        shown = repr(found) if len(repr(found)) <= 80 else f"{repr(found)[:80]}…"
        raise TypeError(
            f"{type(policy).__name__}.place returned {shown}: return a list of positions, which are whole numbers of "
            "tokens; prompt.snap(...) makes cuts of any numbers"
        ) from None
