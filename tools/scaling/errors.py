"""The one failure that a user can cause."""


class ScalingError(ValueError):
    """An expected failure; the message names the file and row, what was found and the fix."""
