"""The one exception of this package."""


class FinetuneError(ValueError):
    """An expected failure; the message names thing, found, expected and fix."""
