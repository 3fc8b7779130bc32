"""Names of prefixes: keyed hashes, so that who routes can tell which replica holds a prefix, and nothing else.

A prompt is hashed once, from left to right, and named at each multiple of `ANCHOR_TOKENS` tokens: these names are
**anchors**. A prefix that ends between two anchors is named by the tokens behind the last one as well. Each namespace
has a key of its own, so that the same tokens have other names for another tenant.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import numpy as np

from ..planning.cuts import Tokens


# Anchors lie so many tokens apart. A tail behind one is shorter, and fits a byte.
ANCHOR_TOKENS = 64
_NAME_BYTES = 8
_LEAST_SECRET = 16


class Keys:
    """Gives each namespace its key.

    Args:
        secret: those who share it give the same prefix the same name; default one that nobody else has.
        block: distance of the anchors in tokens; all who share names use the same.

    Raises:
        ValueError: the secret is too short to be one, or `block` is out of range.
    """

    def __init__(self, secret: bytes | None = None, block: int = ANCHOR_TOKENS) -> None:
        secret = secrets.token_bytes(32) if secret is None else secret
        if len(secret) < _LEAST_SECRET:
            raise ValueError(f"secret has {len(secret)} bytes; give at least {_LEAST_SECRET}, drawn at random")
        if not 1 <= block <= 256:
            raise ValueError(f"block must be between 1 and 256, got {block}; it is the distance of anchors in tokens")
        self.block = block
        self._secret = hashlib.blake2b(secret, digest_size=32).digest()

    def hasher(self, namespace: str) -> Any:
        """A hash at position 0 of every prompt of a namespace."""
        key = hashlib.blake2b(namespace.encode(), key=self._secret, digest_size=32, person=b"namespace").digest()
        return hashlib.blake2b(key=key, digest_size=_NAME_BYTES, person=b"prefix")

    def session(self, namespace: str, name: str) -> int:
        """The name of a session of a namespace."""
        found = self.hasher(namespace)
        found.update(b"session" + name.encode())
        return int.from_bytes(found.digest(), "little")


class Names:
    """The names of all prefixes of one prompt.

    Args:
        keys: name them.
        namespace: whose prompt it is.
        ids: its tokens, int32 `(N,)`.

    Attributes:
        length: tokens of the prompt.
        anchors: the names at 0, `block`, 2 `block`, ...
    """

    def __init__(self, keys: Keys, namespace: str, ids: Tokens) -> None:
        self.length, self.block = len(ids), keys.block
        self._data = np.ascontiguousarray(ids, dtype="<i4").tobytes()
        step, hasher = 4 * keys.block, keys.hasher(namespace)
        self._hashers, self.anchors = [hasher.copy()], [_name(hasher)]
        for start in range(0, len(self._data) - step + 1, step):
            hasher.update(self._data[start : start + step])
            self._hashers.append(hasher.copy())
            self.anchors.append(_name(hasher))

    def at(self, position: int) -> int:
        """The name of the first `position` tokens."""
        block, tail = divmod(position, self.block)
        return self.anchors[block] if not tail else self.behind(block, tail)

    def behind(self, block: int, tail: int) -> int:
        """The name of the prefix that ends `tail` tokens behind an anchor."""
        hasher, start = self._hashers[block].copy(), 4 * self.block * block
        hasher.update(self._data[start : start + 4 * tail])
        return _name(hasher)


def _name(hasher: Any) -> int:
    return int.from_bytes(hasher.digest(), "little")
