"""What proves that a file is as it was written: a checksum, or with a key a signature; and what hides it.

A checksum finds accidents. It carries no secret, so whoever can write a folder can put anything there with the right
checksum. With a key the same place in a file's name holds a keyed BLAKE2b, which nobody without the key can make.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from typing import Any

import numpy as np

from ..errors import DamagedFileError
from ..planning.cuts import Tokens
from .headers import Header, Plain, RefusedFileError, parse_json, tokens_from


VARIABLE = "HF_SPARSE_CACHE_KEY"
_LEAST_BYTES, _NONCE_BYTES = 16, 12


class Seal:
    """How the files of one store or folder are proved, and whether they are encrypted. It shows nothing of its key.

    Args:
        key: a secret of at least 16 bytes, as bytes or a string; None for checksums alone.
        encrypt: whether what is written is encrypted too (AES-256-GCM, of the package `cryptography`).

    Raises:
        ValueError: the key is too short, or there is none to encrypt with.
        ImportError: `cryptography` is not installed.
    """

    def __init__(self, key: str | bytes | None = None, encrypt: bool = False) -> None:
        if key is not None and not isinstance(key, str | bytes):
            raise ValueError(f"key must be a string or bytes, not a {type(key).__name__}")
        secret = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
        if secret is not None and len(secret) < _LEAST_BYTES:
            raise ValueError(
                f"key has {len(secret)} bytes and must have at least {_LEAST_BYTES}; "
                "make one with secrets.token_hex(32), and keep it where the files are not"
            )
        if encrypt and secret is None:
            raise ValueError(f"encrypt=True needs a key; give key=, or set {VARIABLE}")
        self.encrypts = encrypt
        self._signing = None if secret is None else _derived(secret, b"sign")
        self._cipher = None if secret is None or not encrypt else _cipher(_derived(secret, b"encrypt"))
        self._secret = secret

    @classmethod
    def of(cls, key: str | bytes | None, encrypt: bool = False) -> Seal:
        """A seal with the given key, or with that of the environment variable HF_SPARSE_CACHE_KEY, or with none."""
        if key is None and VARIABLE in os.environ:
            try:
                return cls(os.environ[VARIABLE], encrypt)
            except ValueError as error:
                raise ValueError(f"{VARIABLE}: {error}; or unset it") from None
        return cls(key, encrypt)

    def instead(self, key: str | bytes | None, encrypt: bool | None) -> Seal:
        """This seal with another key, or with encryption switched; itself where nothing is given."""
        if key is None and encrypt is None:
            return self
        return Seal(self._secret if key is None else key, self.encrypts if encrypt is None else encrypt)

    def __repr__(self) -> str:
        return f"Seal({'keyed' if self.keyed else 'checksums'}{', encrypted' if self.encrypts else ''})"

    def __reduce__(self) -> Any:
        raise TypeError("a Seal holds a key and is not copied or pickled")

    @property
    def keyed(self) -> str:
        """What tells the key from others, and nobody the key; empty where there is none."""
        return "" if self._secret is None else _derived(self._secret, b"name").hex()[:16]

    def checksum(self, data: Plain) -> str:
        """32 hexadecimal digits of BLAKE2b, keyed where there is a key."""
        hashing = self.hashing()
        hashing.update(data)
        return str(hashing.hexdigest())

    def hashing(self) -> Any:
        """What gives the checksum of a file that is handed to it part by part."""
        return hashlib.blake2b(digest_size=16, key=self._signing or b"")

    def fits(self, data: Plain, digits: str) -> bool:
        """Whether these are the checksum of `data`."""
        return same_digits(self.checksum(data), digits)

    def refusal(self, record: dict[str, Any]) -> str | None:
        """Why files with such a record are not read with this key, or without one; None when they may be."""
        written = record.get("keyed")
        if written is None:
            return "it was written without a key, and a key is given: nobody vouches for it" if self.keyed else None
        if not self.keyed:
            return f"it was written with a key; give key=, or set {VARIABLE}"
        return None if written == self.keyed else f"it was written with another key than key= or {VARIABLE} gives"

    def closed(self, data: bytes, record: dict[str, Any], tokens: Tokens, steady: bool = False) -> bytes:
        """The bytes to write for a file: `data` itself, or a file of the same form that hides it.

        Args:
            steady: whether equal content gives equal bytes, which shows that it is equal.
        """
        if self._cipher is None:
            return data
        import safetensors.numpy

        head = json.dumps({"record": record, "tokens": tokens.tolist()}).encode()
        tensors = {"head": self._hidden(head, b"head", steady), "body": self._hidden(data, b"body", steady)}
        marks = {"format": record["format"], "keyed": self.keyed, "encrypted": True}
        hidden: bytes = safetensors.numpy.save(tensors, {"unit": json.dumps(marks)})
        return hidden

    def opened(self, data: Plain) -> Plain:
        """The plain file in the bytes of a proved one.

        Raises:
            DamagedFileError: it cannot be opened with this key.
        """
        header = Header.parse(data, len(data))
        if header.record().get("encrypted") is not True:
            return data
        begin, end = header.place("body", "U8", 1)
        return self._shown(data[begin:end], b"body")

    def head(self, hidden: Plain) -> tuple[dict[str, Any], Tokens]:
        """The record and the tokens in the head of an encrypted file.

        Raises:
            DamagedFileError: it cannot be opened with this key.
        """
        value = parse_json(self._shown(hidden, b"head"))
        return value["record"], tokens_from(np.array(value["tokens"], dtype="<i4").tobytes())

    def hasher(self, use: bytes) -> Any:
        """A BLAKE2b for names, keyed where there is a key: nobody without it can guess what a name stands for."""
        key = b"" if self._secret is None else _derived(self._secret, b"address")
        return hashlib.blake2b(digest_size=16, key=key, person=use)

    def _hidden(self, data: bytes, part: bytes, steady: bool) -> np.ndarray[Any, Any]:
        nonce = os.urandom(_NONCE_BYTES)
        if steady:  # it follows from the key and all of the content, so that none serves two contents
            key = _derived(self._secret or b"", b"nonce")
            nonce = hashlib.blake2b(data, digest_size=_NONCE_BYTES, key=key, person=part).digest()
        return np.frombuffer(nonce + self._cipher.encrypt(nonce, data, part), dtype=np.uint8)  # type: ignore[union-attr]

    def _shown(self, hidden: Plain, part: bytes) -> bytes:
        if self._secret is None:
            raise RefusedFileError(f"it is encrypted; give key=, or set {VARIABLE}")
        cipher = self._cipher or _cipher(_derived(self._secret, b"encrypt"))
        from cryptography.exceptions import InvalidTag

        try:
            data: bytes = cipher.decrypt(hidden[:_NONCE_BYTES], hidden[_NONCE_BYTES:], part)
        except (InvalidTag, ValueError) as error:
            raise DamagedFileError("it cannot be decrypted with this key") from error
        return data


def same_digits(one: str, other: str) -> bool:
    """Whether two checksums are the same; to find out takes as long whatever they are."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def _derived(secret: bytes, use: bytes) -> bytes:
    first = hashlib.blake2b(secret, digest_size=32, person=b"hf_sparse_cache").digest()
    return hashlib.blake2b(use, digest_size=32, key=first).digest()


def _cipher(key: bytes) -> Any:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ImportError(
            "Encrypted files need the package cryptography: pip install 'hf_sparse_cache[encrypt]'"
        ) from error
    return AESGCM(key)
