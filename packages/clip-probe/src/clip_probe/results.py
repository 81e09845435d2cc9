"""Result lines, as the commands print them and as a suite keeps them."""

import json
import sys
from pathlib import Path
from typing import Any

from clip_probe.errors import ProbeError


def read_results(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; `-` is stdin.

    Raises:
        ProbeError: no such file, or a line that is no JSON object.
    """
    if str(file) != "-" and not file.is_file():
        raise ProbeError(f"no results at {file}: expected JSON Lines of zeroshot, eval or suite")
    try:  # bytes that are no UTF-8 are a ValueError too
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        rows: list[Any] = [json.loads(line) for line in text.splitlines()]
    except ValueError as error:
        raise ProbeError(f"{file} is not JSON Lines ({error}): give a file of results") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ProbeError(f"{file}: expected a JSON object on each line")
    return rows
