"""Names of prefixes: keyed hashes, so that who routes can tell which replica holds a prefix, and nothing else.

A prompt is hashed once, from left to right, and named at each multiple of `ANCHOR_TOKENS` tokens: these names are
**anchors**. A prefix that ends between two anchors is named by the tokens behind the last one as well. Each namespace
has a key of its own, so that the same tokens have other names for another tenant.
"""

from __future__ import annotations

import hashlib
import secrets
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

    def names(self, namespace: str, ids: Tokens) -> Names:
        """The names of all prefixes of a prompt, `ids` as `Names` takes them."""
        return Names(self, namespace, ids)


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


class PaperKeys(Keys):
    """Names for simulations, where nobody has to be kept from guessing tokens: all those of a prompt in one step."""

    def names(self, namespace: str, ids: Tokens) -> PaperNames:
        return PaperNames(self, namespace, ids)


class PaperNames(Names):
    """Sums of a scrambled number for each token at its place: equal where prefixes are, by chance nowhere else."""

    def __init__(self, keys: Keys, namespace: str, ids: Tokens) -> None:
        self.length, self.block = len(ids), keys.block
        terms = np.empty(len(ids) + 1, dtype=np.uint64)
        terms[0] = zlib.crc32(namespace.encode())
        terms[1:] = np.ascontiguousarray(ids, dtype="<i4").view(np.uint32)
        terms += np.arange(len(terms), dtype=np.uint64) << np.uint64(32)
        self._sums = np.cumsum(_scrambled(terms), dtype=np.uint64)
        self.anchors = self._sums[:: keys.block].tolist()

    def behind(self, block: int, tail: int) -> int:
        """The name of the prefix that ends `tail` tokens behind an anchor."""
        return int(self._sums[block * self.block + tail])


def _scrambled(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Another number for each, as different as can be: the finalizer of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def _name(hasher: Any) -> int:
    return int.from_bytes(hasher.digest(), "little")
