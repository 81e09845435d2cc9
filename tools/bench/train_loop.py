"""The whole training loop, data loading included: clip-train against open_clip's trainer.

uv run tools/bench/train_loop.py                    ViT-B-32, batch 16, fp32
uv run tools/bench/train_loop.py --architecture Ti --batch-size 128 --steps 12
                                                    width 192, 6 + 6 layers, 64 pixels

Both trainers are commands of their own that start from the same weights and read the same shards:
480 x 360 JPEGs with a photograph's spectrum, captions of LAION-like length in words that are one
token each. Their clock is when the line of a step appears in their logs, which either writes after
every step. The first steps are not timed, nor are the last, for which no loader works ahead any
more: what is trained on while the clock runs is read while it runs. So start-up and the writing of
the model are left out on both sides. Memory is the sum, over a command's processes, of the most
that each had resident (VmHWM); what loaders share with their parent counts twice.
"""

import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path
from statistics import mean
from typing import Any

import click
import open_clip_trainer
from interleaved import compare
from train_setting import (
    BEFORE,
    LEARNING_RATE,
    Setting,
    choose_device,
    make_setting,
    options,
    script,
)


class Run:
    """One command: when each step was logged, and the memory of its processes."""

    def __init__(self, command: list[Any], log: Path, step: bytes, work: Path) -> None:
        """Run it. Args: step: what the log has for each step."""
        self.logged: list[float] = []
        self._peaks: dict[int, int] = {}
        size = weighed = 0
        with (work / "output").open("w+") as output:
            process = subprocess.Popen(command, cwd=work, stdout=output, stderr=output)
            while process.poll() is None:
                now = time.perf_counter()
                if log.exists() and log.stat().st_size != size:
                    text = log.read_bytes()
                    size = len(text)
                    self.logged += [now] * (text.count(step) - len(self.logged))
                if now > weighed + 0.25:
                    weighed = now
                    self._weigh(process.pid)
                time.sleep(0.005)
            if process.returncode:
                output.seek(0)
                raise click.ClickException(f"{command}: {output.read()[-2000:]}")
        self.text = log.read_text()

    @property
    def peak(self) -> int:
        """Bytes, of all processes."""
        return sum(self._peaks.values())

    def _weigh(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                self._peaks[pid] = int(found[1]) * 1024
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                for child in task.read_text().split():
                    self._weigh(int(child))
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has just ended


class Sides:
    """The two trainers, with the mean loss of each's last run and the memory of its largest."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.losses: dict[str, float] = {}
        self.peaks = {"ours": 0, "open_clip": 0}

    def ours(self) -> float:
        """Seconds of the timed steps of clip-train."""
        s, output = self.setting, self.setting.work / "ours"
        shutil.rmtree(output, ignore_errors=True)
        options = {
            "model": s.model, "train-data": s.shards, "output": output, "samples-seen": s.samples,
            "batch-size": s.batch_size, "workers": s.workers, "precision": s.precision,
            "lr": LEARNING_RATE, "warmup": 1, "log-every": 1, "save-every": s.all_steps,
        }  # fmt: skip
        command = [script("clip-train")]
        for name, value in options.items():
            command += ["--" + name, str(value)]
        run = Run(command, output / "metrics.jsonl", b"\n", s.work)
        rows = [json.loads(line) for line in run.text.splitlines()]
        return self._note("ours", run, [row["loss"] for row in rows])

    def theirs(self) -> float:
        """Seconds of the same steps of open_clip's trainer, which is to save nothing."""
        s, output = self.setting, self.setting.work / "none" / "theirs"
        shutil.rmtree(output, ignore_errors=True)
        command = open_clip_trainer.command(
            s.model, s.shards, samples=s.samples, batch_size=s.batch_size, workers=s.workers,
            name=output.name, logs=output.parent.name, lr=LEARNING_RATE, warmup=1,
            precision={"fp32": "fp32", "bf16": "amp_bf16"}[s.precision],
        )  # fmt: skip
        run = Run(command, output / "out.log", open_clip_trainer.STEP, s.work)
        return self._note(
            "open_clip", run, [float(x) for x in re.findall(r" Loss: (\S+)", run.text)]
        )

    def _note(self, name: str, run: Run, losses: list[float]) -> float:
        if len(run.logged) != self.setting.all_steps:
            raise click.ClickException(f"{name}: {len(run.logged)} steps logged")
        self.losses[name], self.peaks[name] = mean(losses), max(self.peaks[name], run.peak)
        return run.logged[BEFORE + self.setting.steps - 1] - run.logged[BEFORE - 1]


def against_open_clip(setting: Setting, rounds: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Both trainers in turn, each run a new process."""
    sides = Sides(setting)
    report = compare(
        {"ours": sides.ours, "open_clip": sides.theirs},
        rounds=rounds,
        warmup=0,
        work=setting.steps * setting.batch_size,
        unit="samples",
        arguments=arguments,
        own_clock=True,
    )
    # Not the same to the digit: each reads the pairs in an order of its own.
    if not math.isclose(*sides.losses.values(), rel_tol=0.1):
        raise click.ClickException(f"the sides do not do the same: mean losses {sides.losses}")
    peaks = {name: peak / 2**20 for name, peak in sides.peaks.items()}
    return report | {"peak_mib": peaks, "mean_losses": sides.losses}


@click.command()
@options
@click.option("--device", default="cpu", show_default=True, help="cpu, or what is there.")
def main(
    architecture: str, batch_size: int, precision: str, device: str, workers: int, threads: int,
    steps: int, rounds: int,
) -> None:  # fmt: skip
    """Time the steps of whole training runs, ours against open_clip's."""
    choose_device(device, threads)
    arguments = dict(click.get_current_context().params)
    with make_setting(architecture, batch_size, steps, workers, precision) as (setting, lengths):
        report = against_open_clip(setting, rounds, arguments)
    click.echo(json.dumps(report | {"caption_tokens": lengths}))


if __name__ == "__main__":
    main()
