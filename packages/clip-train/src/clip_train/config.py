"""What a training run is: one frozen dataclass; the command's options are generated from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from clip_train.errors import TrainError

# Fields that change neither the weights nor the order of samples: free to differ on a resume.
# The data and the initial model are compared by content (`state.Run`), not by the path given here.
NEUTRAL = frozenset(
    {"model", "train_data", "output", "workers", "max_error_share", "save_every", "log_every"}
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The arguments of a run. Defaults follow OpenCLIP's ViT recipe (arXiv 2212.07143)."""

    model: Annotated[
        str,
        "Architecture name or open_clip model_cfg JSON file (random weights drawn from --seed), "
        "or a model directory (its weights).",
    ]
    train_data: Annotated[
        str,
        "Shards: a directory of .tar files, or a brace pattern or glob: 'data/{00000..00041}.tar'.",
    ]
    output: Annotated[
        Path,
        "Run directory: metrics.jsonl, state/ to resume from, and at the end model/, loss.png.",
    ]
    samples_seen: Annotated[
        int, "Pairs to train on, repeats included; rounded up to whole batches."
    ]
    batch_size: Annotated[int, "Global batch: pairs per step over all processes."]
    lr: Annotated[float, "Peak learning rate."] = 5e-4
    warmup: Annotated[int, "Steps of linear warm-up; a cosine to zero follows."] = 2000
    weight_decay: Annotated[
        float, "AdamW weight decay; gains, biases and logit scale have none."
    ] = 0.2
    beta1: Annotated[float, "AdamW beta 1."] = 0.9
    beta2: Annotated[float, "AdamW beta 2."] = 0.98
    eps: Annotated[float, "AdamW epsilon."] = 1e-6
    grad_clip: Annotated[float, "Largest norm of the whole gradient; 0: no clipping."] = 0.0
    precision: Annotated[
        Literal["auto", "bf16", "fp32"], "Autocast of both towers; auto: bf16 on a GPU, else fp32."
    ] = "auto"
    seed: Annotated[int, "Seed of the weights, the order of samples and the crops."] = 0
    shuffle_shards: Annotated[
        int, "Shards open at once: samples are shuffled among this many shuffled shards."
    ] = 16
    workers: Annotated[
        int, "Loader processes per training process; 0: load in the process itself."
    ] = 4
    max_error_share: Annotated[
        float, "Stop when more than this share of samples is unreadable."
    ] = 0.05
    save_every: Annotated[int, "Steps between saves of the train state; the last two are kept."] = (
        500
    )
    log_every: Annotated[int, "Steps between rows of metrics.jsonl."] = 10

    def __post_init__(self) -> None:
        for name in ("samples_seen", "batch_size", "shuffle_shards", "save_every", "log_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "weight_decay", "grad_clip", "seed", "workers"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "eps"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        for name in ("beta1", "beta2", "max_error_share"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("shuffle_shards", self.shuffle_shards <= 64, "at most 64")
        fix = f"of the run's {self.steps} steps (--samples-seen / --batch-size)"
        self._require("warmup", self.warmup < self.steps, fix=f"fewer than all {fix}")

    def _require(self, name: str, holds: bool, fix: str) -> None:
        if not holds:
            option = "--" + name.replace("_", "-")
            raise TrainError(f"{option} is {getattr(self, name)}; it must be {fix}")

    @property
    def steps(self) -> int:
        """Optimiser steps of the run: enough whole batches for `samples_seen`."""
        return -(-self.samples_seen // self.batch_size)

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in vars(self).items()}
