"""What an argument must be, checked in one place: the error names the argument, its value and what to give instead."""

from __future__ import annotations

import operator
import os
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_ID = 2**31 - 1  # tokens are kept as int32
MOST_STATE_BYTES, MOST_TOKEN_BYTES = 2**50, 2**36  # of one checkpoint, and of one token: sums of them fit 64 bits
_SHOWN = 60


def is_whole(value: Any, least: int, most: int | None = None) -> bool:
    """Whether a value is a whole number of a range; `most` is None for no upper end, and truth values are none."""
    try:
        number = operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool) and number >= least and (most is None or number <= most)


def whole_number(name: str, value: Any, least: int, hint: str, most: int | None = None) -> int:
    """A count, a size or a position.

    Args:
        name: of the argument.
        least, most: the range; no upper end when `most` is None.
        hint: what the argument is for, or what to give instead.

    Raises:
        ValueError: it is no whole number, or outside the range.
    """
    if not is_whole(value, least, most):
        span = f"at least {least:,}" if most is None else f"from {least:,} to {most:,}"
        raise ValueError(f"{name} must be a whole number, {span}, got {shown(value)}; {hint}")
    return operator.index(value)


def token_ids(value: Any, where: str, *, empty: bool = False) -> NDArray[np.int32]:
    """Token ids as they are stored.

    Args:
        value: integers of shape `(N,)` or `(1, N)`: a list, an array, or a tensor on any device.
        where: the argument, or the line of a file.
        empty: whether there may be none.

    Returns:
        int32 of shape `(N,)`.

    Raises:
        ValueError: it holds something else, such as fractions, truth values, or ids that 31 bits cannot hold.
    """
    import numpy as np

    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    try:
        ids = np.asarray(value)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"{where} has a prompt of nested lists; give integer token ids of shape (N,)") from error
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    kinds = set(map(type, value)) if isinstance(value, list | tuple) else set()
    if bool in kinds:  # beside integers they would pass for 0 and 1
        raise ValueError(f"{where} has a prompt with truth values; give integer token ids of shape (N,)")
    if ids.ndim == 1 and not ids.size:
        if empty:
            return np.empty(0, dtype=np.int32)
        raise ValueError(f"{where} has an empty prompt, which has nothing to match; leave it out")
    if kinds == {int} and ids.dtype.kind in "Of":  # no integer of numpy holds them
        raise _out_of_range(where, next(item for item in value if not 0 <= item <= MOST_ID))
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{where} has a prompt of {ids.dtype} {ids.shape}; give integer token ids of shape (N,)")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > MOST_ID:
        raise _out_of_range(where, low if low < 0 else high)
    return ids.astype(np.int32, copy=False)


def _out_of_range(where: str, value: int) -> ValueError:
    return ValueError(
        f"{where} has a prompt with the token id {shown(value)}; ids go from 0 to {MOST_ID:,}, as a tokenizer gives "
        "them"
    )


def text(name: str, value: Any, hint: str) -> str:
    """Text that files and digests can hold.

    Raises:
        ValueError: it is no string, or has half a character: a surrogate without its partner has no UTF-8.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {shown(value)}; {hint}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is {shown(value)}, whose character {error.start} is half of a surrogate pair and has no UTF-8; "
            f"{hint}"
        ) from None
    return value


def path_of(name: str, value: Any) -> Path:
    """A path that the caller names.

    Raises:
        ValueError: no file or folder can be called so; an empty name would be the folder that the process runs in.
    """
    if not isinstance(value, str | os.PathLike) or not isinstance(path := os.fspath(value), str):
        raise ValueError(f"{name} must be a path, got {shown(value)}; give a string or a pathlib.Path")
    if not path.strip() or "\0" in path:
        raise ValueError(f"{name} is {shown(path)}, which nothing can be called; give the path of a folder")
    return Path(path)


def shown(value: Any) -> str:
    """A value for an error message: short, in ASCII where it is not printable, whatever it is."""
    try:
        found = repr(value)
    except Exception as error:  # of a user's own class, or an integer of more digits than Python writes
        found = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return printable(found if len(found) <= _SHOWN else f"{found[:_SHOWN]}…").replace("\n", " ")


def printable(words: str) -> str:
    """Text for a terminal: what would steer it (escapes, carriage returns, marks of direction) is spelt out."""
    if words.isascii() and words.isprintable():
        return words
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else ascii(char)[1:-1]
        for char in words
    )
