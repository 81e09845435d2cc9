"""The processes of a run: starting them through Accelerate, and agreeing on how to go on."""

import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from importlib.util import find_spec
from types import FrameType
from typing import Any, Literal, Self, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.sharding import fsdp_wanted, shard

logger = logging.getLogger(__name__)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
TIMEOUT = timedelta(minutes=10)  # for any collective: a lost process ends the run, never hangs it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def start_processes(config: TrainConfig) -> Accelerator:
    """Join the processes that `accelerate launch` or torchrun started.

    Raises:
        TrainError: each process would train alone, or under an engine other than DDP and FSDP2; or
            the tracker's package is missing.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        raise TrainError(
            f"srun started {tasks} tasks, and each would train alone; start one task a node, with "
            "torchrun or accelerate launch in it"
        )
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
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        _live_with_the_launcher()
        # it sets OMP_NUM_THREADS to 1, for GPUs; a CPU that trains alone needs all
        if accelerator.device.type == "cpu":
            torch.set_num_threads(max(torch.get_num_threads(), os.cpu_count() or 1))
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    engines = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in engines:
        raise TrainError(
            f"{accelerator.distributed_type.value} is not supported; expected DDP or FSDP2"
        )
    if accelerator.is_main_process:
        _warn_of_unused_settings(config)
    return accelerator


def _live_with_the_launcher() -> None:
    """`accelerate launch` passes no signal on: when it ends, let this process save and stop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _keep_freed_memory() -> None:
    """Let a step find its gradients' memory where the last step left it.

    glibc gives large blocks back to the system, which clears every page of them once more.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _warn_of_unused_settings(config: TrainConfig) -> None:
    """Name our options for those settings of `accelerate config` that we do not read."""
    for name, ours, same in (
        ("MIXED_PRECISION", "precision", ("no", config.precision)),
        ("DYNAMO_BACKEND", "compile", ("no", "inductor") if config.compile else ("no",)),
        ("GRADIENT_ACCUMULATION_STEPS", "micro-batch-size", ("1",)),
    ):
        value = os.environ.get(f"ACCELERATE_{name}", same[0]).lower()
        if value not in same:
            logger.warning(
                "accelerate's %s %s is not used; the option is --%s", name.lower(), value, ours
            )


def check_same(accelerator: Accelerator, found: Any) -> None:
    """Compare what each process found on its disk.

    Raises:
        TrainError: on all processes, if they differ.
    """
    everyone: list[Any] = gather_object([found])
    if any(other != everyone[0] for other in everyone):
        raise TrainError(
            "the processes see different settings, data or train states; --output must be on a "
            "disk that all share, and --train-data the same on all"
        )


@contextmanager
def failures_named() -> Generator[None]:
    """Turn what torch raises where memory runs out, or a process is lost, into a TrainError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainError(
            f"out of memory: {error}; hold less at once: a smaller --micro-batch-size, or "
            "--grad-checkpointing"
        ) from error
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
            raise
        raise TrainError(
            f"a process of the run was lost, or does not answer ({str(error).splitlines()[0]}); "
            "start again to continue from the last save"
        ) from error


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
    """What --precision comes to on a device; fp32 means TF32 on a GPU.

    Beside half-precision towers the loss is all that multiplies float32, and does so in full.
    """
    cuda = device.type == "cuda"
    if asked == "auto":
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        asked = "bf16" if native else "fp32"
    if cuda:
        torch.set_float32_matmul_precision("high" if asked == "fp32" else "highest")
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
        self._asked = 0.0  # when last
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
        # Only Ctrl-C ends the process at once, and only a later one: launchers pass on to each
        # process what it got itself.
        now = time.monotonic()
        if number == signal.SIGINT and self.stop_requested and now - self._asked > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stop_requested, self._asked = True, now

    def sums(self, *values: int) -> list[int]:
        """Each value summed over all processes."""
        if self._group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self._group)
        return [int(v) for v in total]
