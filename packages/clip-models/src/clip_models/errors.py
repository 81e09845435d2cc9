"""The package's expected failures."""


class ModelError(ValueError):
    """An expected failure: the message names the thing, what was found or expected, and the fix."""


class ImageError(ModelError):
    """Bytes that are not a readable image, or one larger than the pixel limit."""
