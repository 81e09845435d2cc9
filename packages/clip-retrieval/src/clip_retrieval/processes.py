"""The processes that `accelerate launch` or torchrun started; each embeds a share of the parts."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState

from clip_retrieval.errors import RetrievalError

_TIMEOUT = timedelta(hours=6)  # the one that is done first waits for the others


def join_processes() -> PartialState | None:
    """Join the others; None where this process was started by itself.

    Raises:
        RetrievalError: the processes do not find each other.
    """
    asked, launched = "WORLD_SIZE" in os.environ, "ACCELERATE_MIXED_PRECISION" in os.environ
    if not asked and not launched:
        return None
    on_cpu = not torch.cuda.is_available() or bool(os.environ.get("ACCELERATE_USE_CPU"))
    state = PartialState(cpu=on_cpu, timeout=_TIMEOUT)
    # accelerate's `--cpu --num_processes 2` starts one process, and says so only by this variable
    alone = launched and not asked and "MASTER_ADDR" in os.environ
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted != state.num_processes or alone:  # each would embed everything
        raise RetrievalError(
            f"the launcher started {'several' if alone else wanted} processes, but this one finds "
            f"{state.num_processes} in its group; several on CPU: ACCELERATE_USE_CPU=true torchrun "
            "--nproc-per-node 2 -m clip_retrieval embed …"
        )
    # `accelerate launch` sets OMP_NUM_THREADS to 1, for GPUs; a CPU that works alone needs all
    if launched and wanted == 1 and on_cpu:
        torch.set_num_threads(max(torch.get_num_threads(), os.cpu_count() or 1))
    return state
