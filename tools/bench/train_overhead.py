"""What the training loop costs beside the step that it takes, in one process.

uv run tools/bench/train_overhead.py                ViT-B-32, batch 16, fp32

`clip_train.train` with its loader beside it, the same on batches in memory, and the step alone on
the same batches, normalised before. The data are those of train_loop.py.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click
from interleaved import compare
from train_setting import BEFORE, LEARNING_RATE, Setting, choose_device, make_setting, options


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
@options
def main(
    architecture: str, batch_size: int, precision: str, workers: int, threads: int, steps: int,
    rounds: int,
) -> None:  # fmt: skip
    """Time the loop, with its loader and on batches in memory, beside its bare step, on a CPU."""
    choose_device("cpu", threads)
    arguments = dict(click.get_current_context().params)
    with make_setting(architecture, batch_size, steps, workers, precision) as (setting, lengths):
        report = against_step(setting, rounds, arguments)
    click.echo(json.dumps(report | {"caption_tokens": lengths}))


if __name__ == "__main__":
    main()
