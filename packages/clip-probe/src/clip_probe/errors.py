"""The one exception of this package."""


class ProbeError(ValueError):
    """An expected failure; it names the thing, what was found and expected, and the fix."""
