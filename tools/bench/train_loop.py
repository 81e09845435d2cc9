"""The whole training loop, data loading included: clip-train against open_clip's trainer.

uv run tools/bench/train_loop.py                    ViT-B-32, batch 16, fp32
uv run tools/bench/train_loop.py --architecture Ti --batch-size 128 --steps 12
                                                    width 192, 6 + 6 layers, 64 pixels
uv run tools/bench/train_loop.py --peer step        clip-train's loop against its bare step

Both trainers are commands of their own that start from the same weights and read the same shards:
480 x 360 JPEGs with a photograph's spectrum, captions of LAION-like length in words that are one
token each. Their clock is when the line of a step appears in their logs, which either writes after
every step. The first steps are not timed, nor are the last, for which no loader works ahead any
more: what is trained on while the clock runs is read while it runs. So start-up and the writing of
the model are left out on both sides. Memory is the sum, over a command's processes, of the most
that each had resident (VmHWM); what loaders share with their parent counts twice.

--peer step stays in one process: `clip_train.train` with its loader beside it, the same on batches
in memory, and the step alone on the same batches, normalised before.
"""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import click
import open_clip_trainer
from build_shards import write_images
from interleaved import compare

BEFORE = 2  # steps before the clock starts
AHEAD = 2  # batches that each worker of a loader makes ahead: torch's default
LEARNING_RATE = 1e-5


class Setting(NamedTuple):
    """What both sides train."""

    model: Path
    shards: Path
    work: Path
    batch_size: int
    steps: int
    """Those that are timed."""
    workers: int
    precision: str

    @property
    def all_steps(self) -> int:
        """With those before and after; each worker of open_clip's loader makes as many."""
        workers = max(1, self.workers)
        return math.ceil((BEFORE + self.steps + AHEAD * workers) / workers) * workers

    @property
    def samples(self) -> int:
        """Pairs of all steps; the shards hold each once."""
        return self.all_steps * self.batch_size


# The data -----------------------------------------------------------------------------------------


def captions(count: int, longest: int) -> list[str]:
    """Words of one token; as long as LAION's captions are, as in train_step.py."""
    from open_clip.tokenizer import SimpleTokenizer

    words = [w[:-4] for w in SimpleTokenizer().encoder if re.fullmatch(r"[a-z]{3,9}</w>", w)]
    noise, sigma = random.Random(0), 0.6
    mean_of_log = math.log(18) - sigma**2 / 2  # of 18 tokens, start and end included
    lengths = [round(noise.lognormvariate(mean_of_log, sigma)) for _ in range(count)]
    return [" ".join(noise.choices(words, k=min(max(n, 4), longest) - 2)) for n in lengths]


def build_shards(setting: Setting, texts: list[str]) -> None:
    """The shards, by clip-data."""
    (files := setting.work / "files").mkdir()
    rows = write_images(files, len(texts))
    table = "".join(
        json.dumps(row | {"caption": text}) + "\n" for row, text in zip(rows, texts, strict=True)
    )
    (files / "table.jsonl").write_text(table)
    each = math.ceil(len(rows) / (4 * max(1, setting.workers)))
    command = [_script("clip-data"), "build", files / "table.jsonl", setting.shards]
    subprocess.check_output([*command, "--samples-per-shard", str(each)])


def _script(name: str) -> Path:
    return Path(sys.executable).with_name(name)


# Against open_clip --------------------------------------------------------------------------------


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
        command = [_script("clip-train")]
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


# Against the bare step ----------------------------------------------------------------------------


def against_step(setting: Setting, rounds: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """The loop and the step that it takes, in this process."""
    import torch
    from clip_models import load_model
    from clip_train import TrainConfig, loop, train
    from clip_train.loader import Batch, Batches
    from clip_train.optimizers import make_optimizer
    from clip_train.step import Stepper

    config = TrainConfig(
        model=str(setting.model), train_data=str(setting.shards), output=setting.work / "run",
        samples_seen=setting.samples, batch_size=setting.batch_size, workers=setting.workers,
        precision=setting.precision, lr=LEARNING_RATE, warmup=1, log_every=1,
        save_every=setting.all_steps,
    )  # fmt: skip
    load, taken = loop.load, Batches.__getitem__
    kept: list[Batch] = []

    def run_loop(batches: Callable[..., Iterator[Batch]]) -> float:
        stamps: list[float] = []

        def stamped(*arguments: Any) -> Iterator[Batch]:
            for batch in batches(*arguments):
                stamps.append(time.perf_counter())
                yield batch

        shutil.rmtree(config.output, ignore_errors=True)
        loop.load = stamped
        try:
            train(config)
        finally:
            loop.load = load
        return stamps[BEFORE + setting.steps] - stamps[BEFORE]

    def keep(batches: Batches, steps: range, *_: Any) -> Iterator[Batch]:
        for step in steps:
            kept.append(taken(batches, step))
            yield kept[-1]

    run_loop(keep)  # warms up as well
    loaded = load_model(setting.model)
    model = loaded.model.train()
    stepper = Stepper(
        model, model, make_optimizer(model, config), config, normalize=lambda images: images,
        autocast=torch.bfloat16 if setting.precision == "bf16" else None,
    )  # fmt: skip
    ready = [(loaded.preprocess.normalize(b.images_b3SS), b.tokens_bL) for b in kept]

    def bare() -> float:
        stepper.step(*ready[BEFORE - 1], lr=LEARNING_RATE, seed=0)
        start = time.perf_counter()
        for batch in ready[BEFORE : BEFORE + setting.steps]:  # those that the loop is timed on
            stepper.step(*batch, lr=LEARNING_RATE, seed=0)
        return time.perf_counter() - start

    report = compare(
        {
            "ours": partial(run_loop, load),
            "step": bare,
            "ours, batches in memory": partial(run_loop, lambda *_: iter(kept)),
        },
        rounds=rounds,
        warmup=0,
        work=setting.steps * setting.batch_size,
        unit="samples",
        arguments=arguments,
        own_clock=True,
    )
    seconds = {name: side["median"] for name, side in report["sides"].items()}
    loops = [name for name in seconds if name != "step"]
    return report | {"overhead": {name: seconds[name] / seconds["step"] - 1 for name in loops}}


@click.command()
@click.option("--architecture", default="ViT-B-32", show_default=True, help="The model.")
@click.option("--batch-size", default=16, show_default=True, help="Pairs in a step.")
@click.option(
    "--peer",
    type=click.Choice(["open_clip", "step"]),
    default="open_clip",
    show_default=True,
    help="open_clip's trainer, or our own step without the loop.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="bf16: autocast, as either trainer does it.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, or what is there.")
@click.option("--workers", default=1, show_default=True, help="Loader processes of either side.")
@click.option("--threads", default=2, show_default=True, help="Of torch, on a CPU.")
@click.option("--steps", default=5, show_default=True, help="Timed steps of a run.")
@click.option("--rounds", default=5, show_default=True, help="Timed runs of each side.")
def main(
    architecture: str, batch_size: int, peer: str, precision: str, device: str, workers: int,
    threads: int, steps: int, rounds: int,
) -> None:  # fmt: skip
    """Time the steps of whole training runs: ours against open_clip's, or against the bare step."""
    if peer == "step" and device != "cpu":
        raise click.UsageError("--peer step runs on the CPU")
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    import torch
    from clip_models import Tokenizer, read_model_config

    torch.set_num_threads(threads)
    arguments = dict(click.get_current_context().params)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        setting = Setting(
            work / "model", work / "shards", work, batch_size, steps, workers, precision
        )
        subprocess.check_output([_script("clip-models"), "init", architecture, setting.model])
        longest = read_model_config(setting.model)[0].text_cfg.context_length
        texts = captions(setting.samples, longest)
        build_shards(setting, texts)
        against = against_step if peer == "step" else against_open_clip
        report = against(setting, rounds, arguments)
    lengths = Tokenizer(longest)(texts).argmax(dim=1) + 1
    report["caption_tokens"] = {"mean": float(lengths.float().mean()), "max": int(lengths.max())}
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
