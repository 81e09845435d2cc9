"""The package's expected failures."""


class RetrievalError(ValueError):
    """An expected failure; the message names the thing, found, expected and the fix."""
