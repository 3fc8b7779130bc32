"""Errors with a name of their own."""


class UnsupportedModelError(ValueError):
    """The model's state cannot be captured and restored exactly; the message says why and what is supported."""
