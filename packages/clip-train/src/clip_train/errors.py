"""The package's expected failures."""


class TrainError(ValueError):
    """An expected failure; the message names the thing, what was found and expected, the fix."""
