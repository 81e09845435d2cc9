"""The processes of a run: starting them through Accelerate, and agreeing on how to go on."""

import os
import signal
from datetime import timedelta
from types import FrameType
from typing import Self, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from clip_train.errors import TrainError

TIMEOUT = timedelta(minutes=10)  # for any collective: a lost process ends the run, never hangs it


def start_processes() -> Accelerator:
    """Join the processes that `accelerate launch` or torchrun started.

    Raises:
        TrainError: each process would train alone, or under an engine other than DDP.
    """
    accelerator = Accelerator(
        mixed_precision="no",  # step.py's autocast is the only one
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=TIMEOUT),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    asked, found = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    # accelerate's `--cpu --num_processes 2` starts one process, and says so only by this variable
    alone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if asked != found or (alone and "ACCELERATE_MIXED_PRECISION" in os.environ):
        raise TrainError(
            f"the launcher asked for {'several' if alone else asked} processes, but this one finds "
            f"{found} in its group; several on CPU: "
            "ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 clip-train ..."
        )
    # `accelerate launch` sets OMP_NUM_THREADS to 1, for GPUs; a CPU that trains alone needs all
    if (
        accelerator.device.type == "cpu"
        and found == 1
        and "ACCELERATE_MIXED_PRECISION" in os.environ
    ):
        torch.set_num_threads(max(torch.get_num_threads(), os.cpu_count() or 1))
    engines = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in engines:
        raise TrainError(
            f"{accelerator.distributed_type.value} is not supported; expected plain DDP"
        )
    return accelerator


class Agreement:
    """What all processes settle before each step, so that all go on, stop or fail together.

    Sums of a few integers over a gloo group: the CPU waits, a GPU's queue does not.
    """

    def __init__(self, world: int) -> None:
        self.stop_requested = False
        self._group: dist.ProcessGroup | None = None
        if world > 1:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=TIMEOUT))

    def __enter__(self) -> Self:
        """From here on SIGTERM and Ctrl-C ask for a stop."""
        signals = (signal.SIGTERM, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._request_stop) for number in signals}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request_stop(self, number: int, _frame: FrameType | None) -> None:
        self.stop_requested = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def sums(self, *values: int) -> list[int]:
        """Each value summed over all processes."""
        if self._group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self._group)
        return [int(v) for v in total]
