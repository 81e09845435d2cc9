"""Zero-shot scores of `clip-probe` and of CLIP_benchmark's own command, digit for digit.

tools/bench/peers.sh ENVROOT clip-benchmark
uv run tools/peer_zeroshot.py ENVROOT MODEL SET...

MODEL is a model directory, which the peer loads in open_clip; each SET a labelled set with a split
`test`. scikit-learn's digits come on top: small, large, and with many labels each. One line for
each score; exit 1 if any differs. The peer runs in float32 (`--no_amp`), as we do.
"""

import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

METRICS = ("acc1", "acc5", "mean_per_class_recall", "mean_average_precision")
ROUNDING = 1e-6  # of mean average precision; the others are equal to the last digit
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ('a photo of the number: "{c}".', "a drawing of the digit {c}.")


def write_digits(path: Path, size: int, extension: str) -> Path:
    """The 1,797 digits as pictures of a size, with the label as a class number."""
    return write_set(path, digits(size, extension, lambda d: ("cls", str(d).encode())), NUMBERS)


def write_properties(path: Path, size: int) -> Path:
    """The digits with many labels each: even, odd, prime, small, and one that none has.

    Average precision depends on the order of all images, so that one pixel a level off shows: they
    have the model's own size, and neither side resizes. Even then float32 may swap two that score
    alike, which moves it by less than ROUNDING.
    """

    def labels(digit: int) -> tuple[str, bytes]:
        held = [digit % 2 == 0, digit % 2 == 1, digit in (2, 3, 5, 7), digit < 5, False]
        out = io.BytesIO()
        np.save(out, np.array(held, np.int64))
        return "npy", out.getvalue()

    names = ("an even number", "an odd number", "a prime number", "a small number", "a letter")
    write_set(path, digits(size, "png", labels), names)
    (path / "dataset_type.txt").write_text("multilabel\n")
    return path


def digits(size: int, extension: str, label: Any) -> Iterator[dict[str, bytes]]:
    data: Any = load_digits()
    for image, digit in zip(data.images, data.target, strict=True):
        grey = Image.fromarray((255 - image * 255 / 16).astype(np.uint8)).convert("RGB")
        out = io.BytesIO()
        name = "JPEG" if extension == "jpg" else extension
        grey.resize((size, size), Image.Resampling.BICUBIC).save(out, name)
        yield {extension: out.getvalue(), **dict([label(int(digit))])}


def write_set(path: Path, samples: Iterator[dict[str, bytes]], names: tuple[str, ...]) -> Path:
    """CLIP_benchmark's layout, in one shard."""
    (path / "test").mkdir(parents=True)
    (path / "classnames.txt").write_text("\n".join(names) + "\n")
    (path / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (path / "test/nshards.txt").write_text("1\n")
    with tarfile.open(path / "test/0.tar", "w") as tar:
        for number, members in enumerate(samples):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def theirs(environment: Path, model: Path, dataset: Path, output: Path) -> dict[str, Any]:
    """The metrics that CLIP_benchmark's command writes."""
    subprocess.run(
        [
            *(environment / "bin/clip_benchmark", "eval", "--dataset", f"wds/{dataset.name}"),
            *("--dataset_root", dataset, "--model", f"local-dir:{model.resolve()}"),
            *("--pretrained", "", "--task", "zeroshot_classification", "--no_amp"),
            *("--num_workers", "0", "--output", output),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return json.loads(output.read_text())["metrics"]


def ours(model: Path, sets: list[Path]) -> list[dict[str, Any]]:
    """The lines of our command."""
    command = [Path(sys.executable).with_name("clip-probe"), "zeroshot", model, *sets]
    done = subprocess.run([*command, "--device", "cpu"], stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@click.command(help=__doc__)
@click.argument("environments", type=click.Path(path_type=Path, exists=True))
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.argument("sets", nargs=-1, type=click.Path(path_type=Path, exists=True))
def main(environments: Path, model: Path, sets: tuple[Path, ...]) -> None:
    """Compare all metrics of all sets."""
    config = json.loads((model / "open_clip_config.json").read_text())
    size, same = config["model_cfg"]["vision_cfg"]["image_size"], True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = [write_digits(work / "digits-8px-png", 8, "png")]
        made += [write_digits(work / "digits-150px-jpg", 150, "jpg")]
        made += [write_properties(work / "digit-properties", size)]
        every = [*sets, *made]
        for dataset, row in zip(every, ours(model, every), strict=True):
            metrics = theirs(environments / "clip-benchmark", model, dataset, work / "out.json")
            for name in (name for name in METRICS if name in metrics):
                found = math.nan if row[name] is None else row[name]  # theirs below five classes
                equal = found == metrics[name] or (math.isnan(found) and math.isnan(metrics[name]))
                if name == "mean_average_precision":
                    equal = abs(found - metrics[name]) < ROUNDING
                about = f"{dataset.name}, {row['samples']} images: {name}"
                differ = "" if equal else f", CLIP_benchmark has {metrics[name]!r}"
                click.echo(f"{'OK  ' if equal else 'DIFF'} {about} {found!r}{differ}")
                same &= equal
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
