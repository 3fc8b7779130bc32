"""Errors with a name of their own."""

from pathlib import Path


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
