"""What a run would be, told without training: its size, its data, and what looks wrong."""

from pathlib import Path
from typing import Any

from clip_models import load_model

from clip_finetune.config import TrainConfig
from clip_finetune.learner import Learner
from clip_finetune.loop import describe_run
from clip_finetune.tower import prepare_tower


def plan_run(model: Path, config: TrainConfig) -> dict[str, Any]:
    """Open tasks and model, and write nothing.

    Raises:
        FinetuneError, ModelError: what `train` would say before its first step.
    """
    tasks, run = describe_run(model, config)
    samples = sum(len(task.data) for task in tasks)
    steps, warmup = config.schedule(samples)
    loaded = load_model(model)
    heads = [task.initial_head(loaded, loaded.model.logit_scale.device) for task in tasks]
    loaded = prepare_tower(loaded, image_size=config.image_size, drop_path=config.drop_path)
    learner = Learner(loaded.model, heads, config)
    warnings: list[str] = []
    for task in tasks:
        share = steps * config.batch_size / len(tasks) / len(task.data)
        if share < 1:
            warnings.append(f"task {task.name}: only {share:.0%} of its images are seen")
        if config.batch_size > len(task.data):
            warnings.append(
                f"task {task.name}: a batch of {config.batch_size} holds its {len(task.data)} "
                "images several times"
            )
    if warmup > steps / 3:
        warnings.append(f"warm-up takes {warmup} of the {steps} steps")
    return {
        "base": run["base"],
        "method": config.method,
        "tasks": {task.name: len(task.data) for task in tasks},
        "steps": steps,
        "warmup": warmup,
        "epochs": round(steps * config.batch_size / samples, 3),
        "image_size": loaded.preprocess.size,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "learning": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "warnings": warnings,
    }
