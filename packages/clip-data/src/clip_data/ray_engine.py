"""The same jobs on a Ray cluster, or on a Ray of this machine where there is none."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from clip_data.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs_on_ray(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int | None
) -> Generator[Result]:
    """Yield function(job) for each job in order, each job a Ray task of one CPU.

    The cluster is RAY_ADDRESS's, and this package must be installed on it; source and output must
    be paths that every node sees, or URLs.

    Args:
        workers: tasks at a time; None for as many as the cluster has CPUs.

    Raises:
        DataError: Ray is not installed or a task was lost.
    """
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise DataError("--engine ray needs Ray: pip install 'clip-data[ray]'") from error
    started = not ray.is_initialized()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if started:
        here: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
        ray.init(include_dashboard=False if here else None, log_to_driver=False, **here)
    task = ray.remote(num_cpus=1)(function)
    limit = workers or int(ray.cluster_resources().get("CPU", 1))
    pending: deque[Any] = deque()
    try:
        for job in jobs:
            pending.append(task.remote(job))
            if len(pending) == 2 * limit:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise DataError(f"Ray: {error}; run the same command again to continue") from error
    finally:
        for reference in pending:
            ray.cancel(reference)
        if started:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray leaves its own
