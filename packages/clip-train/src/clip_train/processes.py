"""The processes of a run: starting them through Accelerate, and agreeing on how to go on."""

import os
import signal
from datetime import timedelta
from hashlib import sha256
from importlib.util import find_spec
from types import FrameType
from typing import Literal, Self, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.sharding import fsdp_wanted, shard

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
TIMEOUT = timedelta(minutes=10)  # for any collective: a lost process ends the run, never hangs it


def start_processes(config: TrainConfig) -> Accelerator:
    """Join the processes that `accelerate launch` or torchrun started.

    Raises:
        TrainError: each process would train alone, or under an engine other than DDP and FSDP2; or
            the tracker's package is missing.
    """
    tracker = None if config.tracker == "none" else config.tracker
    if tracker and not find_spec(tracker):
        raise TrainError(f"--tracker {tracker}: not installed; pip install {tracker}")
    accelerator = Accelerator(
        mixed_precision="no",  # step.py's autocast is the only one
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        log_with=tracker,
        project_dir=config.output,
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
    engines = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in engines:
        raise TrainError(
            f"{accelerator.distributed_type.value} is not supported; expected DDP or FSDP2"
        )
    return accelerator


def distribute(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Move the model to this process's device and spread it: FSDP2 in place, or wrapped in DDP.

    Raises:
        TrainError: FSDP's first version is asked for.
    """
    model.to(accelerator.device)
    sharded = fsdp_wanted()
    if accelerator.num_processes == 1:
        return model
    if sharded:
        shard(model, accelerator.device)
        return model
    # Without device_ids inputs stay where they are: the text tower wants its tokens on the CPU.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def choose_precision(asked: str, device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """What --precision comes to on a device; float32 means TF32 on a GPU."""
    if asked == "auto":
        asked = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    return cast(Literal["bf16", "fp16", "fp32"], asked)


def start_tracker(accelerator: Accelerator, config: TrainConfig) -> None:
    """Open the tracker that --tracker names; a resumed W&B run goes on as the same one."""
    if config.tracker != "none":
        known = {name: v for name, v in config.arguments.items() if v is not None}
        run = sha256(str(config.output.resolve()).encode()).hexdigest()[:16]
        wandb = {"id": run, "name": config.output.name, "resume": "allow", "dir": config.output}
        options = {"wandb": wandb} if config.tracker == "wandb" else {}
        accelerator.init_trackers("clip-train", config=known, init_kwargs=options)


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
        """From here on SIGTERM, SIGUSR1 and Ctrl-C ask for a stop."""
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # Slurm's choice is the last
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
