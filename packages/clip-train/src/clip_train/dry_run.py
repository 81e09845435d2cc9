"""What a run would be, told without training: its sizes, its data, and what looks wrong."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clip_models import ModelConfig, profile, read_model_config

from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.initial import describe_initial, with_patch_dropout
from clip_train.memory import activation_bytes
from clip_train.processes import AUTOCAST, choose_precision
from clip_train.shards import find_shards, open_data

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
    """Weights, gradients, AdamW's state and the running mean on each process, without FSDP."""
    activations_gib: float | None
    """What the forward pass of a process's (micro-)batch keeps, captions padded; None where the
    text tower is a Hugging Face one. The greater part of the rest: allocators need some more."""
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
    towers = with_patch_dropout(_model_config(config.model), config.patch_dropout)
    figures = profile(towers)
    parameters, gmacs = figures["parameters"], figures["gmacs"]
    shards, pairs, warnings = _look_at_data(config, world)
    if config.batch_size % world:
        warnings.append(f"--batch-size {config.batch_size}: not a multiple of {world} processes")
    if config.micro_batch_size >= config.batch_size / world:
        warnings.append(f"--micro-batch-size {config.micro_batch_size}: all of a process's share")
    if config.warmup > _LONG_WARMUP * config.steps:
        share = config.warmup / config.steps
        warnings.append(f"--warmup {config.warmup}: {share:.0%} of the {config.steps} steps")
    bytes_each = _BYTES_PER_PARAMETER + (4 if config.ema else 0)
    return Plan(
        model=config.model,
        parameters=parameters,
        gmacs=gmacs,
        total_gmacs=gmacs and gmacs * config.samples_seen,
        state_gib=parameters and round(bytes_each * parameters / 2**30, 3),
        activations_gib=_activations_gib(config, towers, world),
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


def _activations_gib(config: TrainConfig, towers: ModelConfig, world: int) -> float | None:
    if towers.text_cfg.hf_model_name is not None:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = AUTOCAST[choose_precision(config.precision, device)]
    share = max(1, config.batch_size // world)
    pairs = min(config.micro_batch_size or share, share)
    needed = activation_bytes(towers, pairs, autocast, grad_checkpointing=config.grad_checkpointing)
    return round(needed / 2**30, 3)


def _look_at_data(config: TrainConfig, world: int) -> tuple[int | None, int | None, list[str]]:
    """(shards, pairs in them, what looks wrong)."""
    try:
        shards = find_shards(config.train_data)
        for folder in sorted({shard.parent for shard in shards}):
            if not (folder / "sizes.json").exists():
                missing = (
                    f"{folder}: no sizes.json, so every tar is read to count its pairs, by each "
                    "process at each start; make it once: clip-data index"
                )
                return len(shards), None, [missing]
        counts = open_data(config.train_data, config.train_weights).counts
    except (TrainError, OSError) as error:
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
