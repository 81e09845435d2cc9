"""The package's expected failures."""


class DataError(ValueError):
    """An expected failure; the message names the thing, the found, the expected and the fix."""


class RowError(Exception):
    """One row cannot become a sample: it is counted and the build goes on.

    `reason` is one of a few fixed phrases, to be counted; `detail` is about this row alone.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
