"""Running steps, several at a time: each is a command whose output becomes a file.

A step whose file is there is skipped, so whatever was stopped continues. Commands get SIGTERM when
the study stops, and clip-train and clip-finetune then save their state.
"""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from errors import ScalingError
from study_cells import Step

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """SIGTERM or Ctrl-C, or another task failed."""


class Runner:
    """Runs steps in `out`, `jobs` tasks side by side; holds the file `lock` meanwhile.

    Attributes:
        ran: how many steps were not skipped.
    """

    def __init__(self, out: Path, lock: str, jobs: int, threads: int | None) -> None:
        """Args: threads: of each command; None: as the environment says."""
        self.out, self.jobs, self.ran = out, jobs, 0
        self._lock_file = out / lock
        tools = Path(sys.executable).parent
        self._environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        if threads is not None:
            self._environment["OMP_NUM_THREADS"] = str(threads)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._mutex = threading.Lock()

    def __enter__(self) -> Self:
        """Raises: ScalingError: another runner, or a command that one left, holds the lock."""
        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock_file.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ScalingError(f"{self._lock_file}: held; the study runs already") from None
        signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None
    ) -> None:
        self._lock.close()

    def run(self, tasks: Sequence[Sequence[Step]], what: str = "") -> None:
        """Run each task's steps one after another, and tasks side by side in their order.

        Raises:
            ScalingError: a command failed; the others are stopped.
        """
        pending = [task for task in tasks if any(not self.done(file) for file, _ in task)]
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    futures = [pool.submit(self._task, task) for task in pending]
                    for count, future in enumerate(as_completed(futures), 1):
                        name, seconds = future.result()
                        if what:
                            done = f"{what} {count} of {len(pending)}: {name}"
                            logger.info("%s, %.0f s", done, seconds)
                finally:
                    self._stop()  # nothing is left to stop, but after a failure or a signal
        finally:
            self._stopping = False

    def done(self, file: str) -> bool:
        return (self.out / file).exists()

    def _task(self, task: Sequence[Step]) -> tuple[str, float]:
        started = time.monotonic()
        for file, command in task:
            if not self.done(file):
                self._step(file, command)
        name = Path(task[0][0])
        return name.stem if len(task) == 1 else name.parent.name, time.monotonic() - started

    def _step(self, file: str, command: list[str]) -> None:
        path = self.out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        part, log = path.with_name(path.name + ".part"), path.with_suffix(".log")
        started = time.monotonic()
        with part.open("wb") as output, log.open("wb") as errors:
            with self._mutex:
                if self._stopping:
                    raise StoppedError
                try:
                    process = subprocess.Popen(
                        command,
                        stdout=output,
                        stderr=errors,
                        env=self._environment,
                        start_new_session=True,  # Ctrl-C comes to us, and from us to it, once
                        pass_fds=[self._lock.fileno()],  # locked while a command is left
                    )
                except FileNotFoundError:
                    raise ScalingError(f"{command[0]}: no such command; use uv run") from None
                self._running.add(process)
            status = process.wait()
        with self._mutex:
            self._running.discard(process)
            if status == 0:
                seconds = round(time.monotonic() - started, 2)
                with (path.parent / "times.jsonl").open("a") as times:
                    times.write(json.dumps({"step": path.name, "seconds": seconds}) + "\n")
                part.rename(path)
                self.ran += 1
                return
            if self._stopping:
                raise StoppedError
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing on stderr"]
        raise ScalingError(f"{' '.join(command[:2])} exited with {status}: {said[-1]} (see {log})")

    def _stop(self) -> None:
        with self._mutex:
            self._stopping = True
            for process in self._running:
                with suppress(ProcessLookupError):
                    process.terminate()


def times(folder: Path) -> dict[str, float]:
    """Seconds of the steps whose files are in this folder, the last time that each ran."""
    rows = (json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines())
    return {row["step"]: row["seconds"] for row in rows}


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
