"""The processes of a run: joining them, spreading the model, and being told to stop."""

import math
import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clip_finetune.errors import FinetuneError

_TIMEOUT = timedelta(minutes=10)  # a lost process ends the run, never hangs it


def join_processes() -> Accelerator:
    """Join the processes that `accelerate launch` or torchrun started; alone without them.

    Raises:
        FinetuneError: the processes do not find each other.
    """
    accelerator = Accelerator(  # the only autocast is in learner.py
        mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)]
    )
    asked, found = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    # accelerate's `--cpu --num_processes 2` starts one process, and says so only by this variable
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    alone = launched and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if asked != found or alone:  # each would train alone, all into one OUT
        raise FinetuneError(
            f"the launcher started {'several' if alone else asked} processes, but this one finds "
            f"{found} in its group; several on CPU: ACCELERATE_USE_CPU=true torchrun "
            "--nproc-per-node 2 -m clip_finetune train …"
        )
    # `accelerate launch` sets OMP_NUM_THREADS to 1, for GPUs; a CPU that trains alone needs all
    if launched and found == 1 and accelerator.device.type == "cpu":
        torch.set_num_threads(max(torch.get_num_threads(), os.cpu_count() or 1))
    return accelerator


def distribute(learner: nn.Module, accelerator: Accelerator, *, partly_used: bool) -> nn.Module:
    """The module to call: gradients become the mean over the processes.

    Args:
        partly_used: a step may leave parameters out, as one task's batch the others' heads.
    """
    if accelerator.num_processes == 1:
        return learner
    # Without device_ids inputs stay where they are: the text tower wants its tokens on the CPU.
    return DistributedDataParallel(
        learner, gradient_as_bucket_view=True, find_unused_parameters=partly_used
    )


@contextmanager
def failures_named() -> Generator[None]:
    """Turn what torch raises where memory runs out, or a process is lost, into a FinetuneError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise FinetuneError(
            f"out of memory: {error}; hold less at once: --grad-checkpointing, --precision bf16, "
            "or more processes"
        ) from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
            raise
        raise FinetuneError(
            f"a process of the run was lost, or does not answer ({str(error).splitlines()[0]}); "
            "run this again to continue from the last save"
        ) from error


@contextmanager
def stop_signals() -> Generator[threading.Event]:
    """An event that SIGTERM, SIGUSR1 (Slurm's) and Ctrl-C set, instead of breaking into a step.

    A later Ctrl-C ends the process at once. Only a later one, and no second SIGTERM: launchers pass
    on to each process what it got itself.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    asked = math.inf

    def request(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if number == signal.SIGINT and now - asked > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()
        asked = now

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
