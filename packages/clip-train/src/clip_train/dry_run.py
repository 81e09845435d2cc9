"""What a run would be, told without training: its sizes, its data, and what looks wrong."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_models import ModelConfig, profile, read_model_config

from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.initial import describe_initial
from clip_train.shards import count_samples, find_shards

# Float32 weights, gradients and AdamW's two moments.
_BYTES_PER_PARAMETER = 16

# With a longer warm-up the paper's shortest runs fell behind.
_LONG_WARMUP = 1 / 3


@dataclass(frozen=True)
class Plan:
    """A run as it would be."""

    model: str
    parameters: int | None
    """None where there is no closed form: timm and Hugging Face towers, ResNets."""
    gmacs: float | None
    """1e9 multiply-accumulates of one forward pass of one pair."""
    total_gmacs: float | None
    """Of the run: the paper's compute, gmacs x samples_seen."""
    state_gib: float | None
    """Weights, gradients and optimizer state on each process; activations come on top."""
    samples_seen: int
    batch_size: int
    batch_per_process: float
    steps: int
    warmup: int
    lr: float
    shards: int | None
    """None: see warnings."""
    pairs: int | None
    epochs: float | None
    warnings: list[str]


def plan_run(config: TrainConfig) -> Plan:
    """Look at the model and the data, write nothing, and start no process.

    Raises:
        TrainError: no such model. ModelError: a broken one.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    figures = profile(_model_config(config.model))
    parameters, gmacs = figures["parameters"], figures["gmacs"]
    shards, pairs, warnings = _look_at_data(config, world)
    if config.batch_size % world:
        warnings.append(f"--batch-size {config.batch_size}: not a multiple of {world} processes")
    if config.warmup > _LONG_WARMUP * config.steps:
        share = config.warmup / config.steps
        warnings.append(f"--warmup {config.warmup}: {share:.0%} of the {config.steps} steps")
    return Plan(
        model=config.model,
        parameters=parameters,
        gmacs=gmacs,
        total_gmacs=gmacs and gmacs * config.samples_seen,
        state_gib=parameters and round(_BYTES_PER_PARAMETER * parameters / 2**30, 3),
        samples_seen=config.samples_seen,
        batch_size=config.batch_size,
        batch_per_process=config.batch_size / world,
        steps=config.steps,
        warmup=config.warmup,
        lr=config.lr,
        shards=shards,
        pairs=pairs,
        epochs=pairs and round(config.samples_seen / pairs, 3),
        warnings=warnings,
    )


def _model_config(model: str) -> ModelConfig:
    if Path(model).is_dir():
        return read_model_config(model)[0]
    described: Any = describe_initial(model)
    return ModelConfig.from_dict(described)


def _look_at_data(config: TrainConfig, world: int) -> tuple[int | None, int | None, list[str]]:
    """(shards, pairs in them, what looks wrong)."""
    try:
        shards = find_shards(config.train_data)
        if not (shards[0].parent / "sizes.json").exists():
            missing = f"{shards[0].parent}: no sizes.json, so every tar is read to count its pairs"
            return len(shards), None, [missing]
        counts = count_samples(shards)
    except (TrainError, OSError, json.JSONDecodeError) as error:
        return None, None, [str(error)]
    warnings: list[str] = []
    readers = world * max(1, config.workers)
    if len(shards) < readers:
        warnings.append(
            f"{len(shards)} shards for {readers} loader processes, which will read the same ones: "
            "build smaller shards (clip-data build --samples-per-shard) or take fewer --workers"
        )
    if config.batch_size > sum(counts):
        warnings.append(
            f"--batch-size {config.batch_size}: more than the {sum(counts)} pairs of the data"
        )
    return len(shards), sum(counts), warnings
