"""Independent jobs over several processes, their results in the order of the jobs."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from clip_data.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")

Progress = Callable[[int], object]

_BROKEN = (
    "a worker process was killed, perhaps for want of memory; run the same command again with "
    "fewer --workers to continue"
)

_report: Progress = lambda steps: None  # noqa: E731 -- what this process does with progress


def report_progress(steps: int) -> None:
    """To be called by a job under way."""
    _report(steps)


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    progress: Progress = lambda steps: None,
) -> Generator[Result]:
    """Yield function(job) for each job; no more than two jobs per worker are in memory at a time.

    Close the iterator to stop early: it returns when the jobs under way have ended.

    Args:
        progress: is told, in this process, of the steps that the jobs report.

    Raises:
        DataError: a worker process was killed.
    """
    if workers <= 1:
        yield from _run_here(function, jobs, progress)
        return
    spawn = multiprocessing.get_context("spawn")
    steps = spawn.Value("Q")
    pool = ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(steps,))
    pending: deque[Future[Result]] = deque()
    told = 0

    def next_result() -> Result:
        nonlocal told
        while True:
            done = wait([pending[0]], timeout=0.2).done
            now = steps.value
            progress(now - told)
            told = now
            if done:
                return pending.popleft().result()

    try:
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) == 2 * workers:
                yield next_result()
        while pending:
            yield next_result()
    except BrokenProcessPool as error:
        raise DataError(_BROKEN) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _run_here(
    function: Callable[[Job], Result], jobs: Iterable[Job], progress: Progress
) -> Generator[Result]:
    global _report
    before, _report = _report, progress
    try:
        yield from map(function, jobs)
    finally:
        _report = before


def _start_worker(steps: Any) -> None:
    def count(more: int) -> None:
        with steps.get_lock():
            steps.value += more

    global _report
    _report = count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, and they must not write beside its successor's."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
