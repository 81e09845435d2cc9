"""How a process ends that a launcher started beside others."""

import atexit
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def without_shutdown() -> Generator[None]:
    """Around a whole program: one of several processes ends before Python's own shutdown.

    Torch keeps gloo's threads to the end, and one that lets go of a tensor while Python shuts down
    aborts the process, after a run that went well (pytorch/pytorch#179291). All that is registered
    with `atexit` from here on still runs, and the exit status is the same.
    """
    status = 1  # a traceback's

    def leave() -> None:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit.register(leave)  # first, so that it is called last
    try:
        yield
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
