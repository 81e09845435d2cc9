"""How one of several processes ends."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("pass", 0),
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('what went wrong')", 1),
        ("1 / 0", 1),
    ],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_only_shutdown_is_left_out(end: str, status: int, processes: str) -> None:
    """The status, what is said, and what the program registered are as ever."""
    code = f"""
import atexit, sys
from clip_models import without_shutdown
atexit.register(print, "shutdown")
with without_shutdown():
    print("done", end=" ")
    atexit.register(print, "registered")
    {end}
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"WORLD_SIZE": processes},
    )  # fmt: skip
    assert found.returncode == status, found.stderr
    assert found.stdout == "done registered\n" + ("shutdown\n" if processes == "1" else "")
    assert ("what went wrong" in found.stderr) == ("what" in end)
    assert ("ZeroDivisionError" in found.stderr) == ("/" in end)
