"""The processes of a run: joining them, and SIGTERM."""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

from accelerate import Accelerator

from clip_finetune.errors import FinetuneError


def join_processes() -> Accelerator:
    """Join the processes that `accelerate launch` or torchrun started; alone without them.

    Raises:
        FinetuneError: the processes do not find each other.
    """
    accelerator = Accelerator(mixed_precision="no")  # the only autocast is in loop.py
    asked, found = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if asked != found:  # each would train alone, all into one OUT
        raise FinetuneError(
            f"the launcher started {asked} processes, but this one finds {found} in its group; "
            "several on CPU: ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 "
            "-m clip_finetune train …"
        )
    return accelerator


@contextmanager
def sigterm() -> Generator[threading.Event]:
    """An event that SIGTERM sets, in place of ending the process in the middle of a step."""
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated  # only the main thread may handle signals
        return
    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda _number, _frame: terminated.set())
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous)
