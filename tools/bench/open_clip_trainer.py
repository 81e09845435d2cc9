"""open_clip's own trainer as a command: `open_clip_trainer.py [--one-line] OPTIONS of its own`.

That is open_clip_train.main as it is, but that webdataset 1 marks the end of a tar, which open_clip
3.3.0 takes for a broken sample, so that it gets no mark. --one-line: of a caption of several lines
it reads one drawn at random, as clip-train does, where by itself it would read all as one text.
"""

import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

STEP = b"Train Epoch: "  # in the log, for each step


def command(
    model: Path, shards: Path, *, samples: int, batch_size: int, workers: int, name: str,
    one_line: bool = False, **options: object,
) -> list[str]:  # fmt: skip
    """The command that trains a model directory, with clip-train's defaults where none are given.

    Args:
        shards: a directory of tars.
        samples: pairs in the whole run, which is one epoch, however often it goes through the tars.
        name: the run's directory in its --logs.
        options: more of its options, or other values.
    """
    tars = sorted(path.stem for path in shards.glob("*.tar"))
    defaults = {
        "model": f"local-dir:{model}",
        "train_data": f"{shards}/{{{tars[0]}..{tars[-1]}}}.tar",
        "dataset_type": "webdataset", "train_num_samples": samples, "epochs": 1,
        "batch_size": batch_size, "workers": workers, "precision": "fp32",
        "lr": 5e-4, "warmup": 2000, "wd": 0.2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6,
        "log_every_n_steps": 1, "name": name,
    }  # fmt: skip
    said = [str(Path(__file__)), *(["--one-line"] if one_line else [])]
    for option, value in (defaults | options).items():
        said += ["--" + option.replace("_", "-"), str(value)]
    return [sys.executable, *said]


def draw_line(tokenizer: Callable[[str], Any], text: str) -> Any:
    """The tokens of one of the lines of `text`."""
    return tokenizer(random.choice(text.splitlines()))


if __name__ == "__main__":
    from open_clip_train import data, main

    data.tar_file_expander = partial(data.tar_file_expander, eof_value=None)
    arguments = sys.argv[1:]
    if "--one-line" in arguments:
        arguments.remove("--one-line")
        make = main.get_tokenizer
        main.get_tokenizer = lambda *a, **k: partial(draw_line, make(*a, **k))
    sys.exit(main.main(arguments))
