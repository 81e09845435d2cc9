"""What the loop's benchmarks train on: a model, shards and the options that both scripts share."""

import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
from build_shards import write_images

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
    command = [script("clip-data"), "build", files / "table.jsonl", setting.shards]
    subprocess.check_output([*command, "--samples-per-shard", str(each)])


def script(name: str) -> Path:
    """One of our commands."""
    return Path(sys.executable).with_name(name)


# The scripts' options -----------------------------------------------------------------------------

_OPTIONS = [
    click.option("--architecture", default="ViT-B-32", show_default=True, help="The model."),
    click.option("--batch-size", default=16, show_default=True, help="Pairs in a step."),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        default="fp32",
        show_default=True,
        help="bf16: autocast.",
    ),
    click.option("--workers", default=1, show_default=True, help="Loader processes of a side."),
    click.option("--threads", default=2, show_default=True, help="Of torch, on a CPU."),
    click.option("--steps", default=5, show_default=True, help="Timed steps of a run."),
    click.option("--rounds", default=5, show_default=True, help="Timed runs of each side."),
]


def options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of either script."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def choose_device(device: str, threads: int) -> None:
    """What this process and those it starts are to use."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    import torch

    torch.set_num_threads(threads)


@contextmanager
def make_setting(
    architecture: str, batch_size: int, steps: int, workers: int, precision: str
) -> Generator[tuple[Setting, dict[str, float]]]:
    """A folder with a new model and its shards, and the mean and longest caption in tokens."""
    from clip_models import Tokenizer, read_model_config

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        setting = Setting(
            work / "model", work / "shards", work, batch_size, steps, workers, precision
        )
        subprocess.check_output([script("clip-models"), "init", architecture, setting.model])
        longest = read_model_config(setting.model)[0].text_cfg.context_length
        texts = captions(setting.samples, longest)
        build_shards(setting, texts)
        lengths = Tokenizer(longest)(texts).argmax(dim=1) + 1
        yield setting, {"mean": float(lengths.float().mean()), "max": int(lengths.max())}
