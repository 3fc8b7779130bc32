"""Errors with a name of their own, and how to tell that an allocation failed."""

import re
from pathlib import Path


_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|alloc_failed|not enough memory", re.I
)


class UnsupportedModelError(ValueError):
    """The model's state cannot be captured and restored exactly; the message says why and what is supported."""


class DamagedFileError(ValueError):
    """A file is not what its name, its header or its key say, or holds what this model's states cannot be.

    Nothing of such a file is used. Where states are served, it is named in one warning and computed anew; what the
    caller asked for by name, such as the manifest of a saved cache, raises it.

    Attributes:
        path: the file, where the error is about one.
    """

    path: Path | None = None


class UnprovedError(DamagedFileError):
    """What was handed on while it was still being proved is not what was written. Nothing was computed from it.

    Whoever restored it begins anew: it is stored no longer, and all who ask for its values get this error, for ever.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, and nothing else.

    On a CPU, torch raises a plain `RuntimeError`, as it does for pinned memory and in CUDA's libraries; only its words
    tell it from a fault.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
