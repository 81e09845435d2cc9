"""What a training run is: one frozen dataclass; the command's options are generated from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from clip_train.errors import TrainError

# Fields that change neither the weights nor the order of samples: free to differ on a resume.
# The data and the initial model are compared by content (`state.identity`), not by the path given.
NEUTRAL = frozenset(
    {
        *("model", "train_data", "output", "workers", "max_error_share", "micro_batch_size"),
        *("compile", "grad_checkpointing", "loss_exchange", "max_skipped", "rebase"),
        *("save_every", "save_minutes", "keep_every", "time_limit", "log_every", "tracker"),
        *("val_data", "zeroshot_data", "eval_every"),
        "train_weights",  # the data's hash covers them
    }
)

# Fields that --rebase may not change: the saved weights and optimizer state would not fit them.
FIXED = frozenset({"model", "optimizer", "lock_image", "lock_text", "patch_dropout"})


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
        "Shards: a directory of .tar files, or a brace pattern or glob: 'data/{00000..00041}.tar'; "
        "several of these joined by '::'.",
    ]
    output: Annotated[
        Path,
        "Run directory: metrics.jsonl, state/ to resume from, and at the end model/, loss.png.",
    ]
    samples_seen: Annotated[
        int, "Pairs to train on, repeats included; rounded up to whole batches."
    ]
    batch_size: Annotated[int, "Global batch: pairs per step over all processes."]
    micro_batch_size: Annotated[
        int,
        "Pairs a process holds the activations of at once: the gradient is the whole batch's, for "
        "one more forward pass (GradCache); 0: its whole share.",
    ] = 0
    lr: Annotated[float, "Peak learning rate."] = 5e-4
    warmup: Annotated[int, "Steps of linear warm-up."] = 2000
    schedule: Annotated[
        Literal["cosine", "constant"], "After the warm-up: a cosine to zero, or the peak rate."
    ] = "cosine"
    cooldown: Annotated[
        int, "Last steps of a constant schedule, over which the rate falls to zero in a line."
    ] = 0
    optimizer: Annotated[str, "adamw (fused), or the name of one of timm's."] = "adamw"
    weight_decay: Annotated[float, "Weight decay; gains, biases and logit scale have none."] = 0.2
    beta1: Annotated[float, "AdamW beta 1."] = 0.9
    beta2: Annotated[float, "AdamW beta 2."] = 0.98
    eps: Annotated[float, "AdamW epsilon."] = 1e-6
    grad_clip: Annotated[float, "Largest norm of the whole gradient; 0: no clipping."] = 0.0
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        "Autocast of both towers, fp16 with a scaled loss; fp32: TF32 on a GPU; auto: bf16 on a "
        "GPU that has it, else fp32.",
    ] = "auto"
    compile: Annotated[bool, "Compile the towers (torch.compile)."] = False
    grad_checkpointing: Annotated[
        bool, "Keep no activations within blocks: less memory, a third more work."
    ] = False
    patch_dropout: Annotated[
        float | None, "Share of patches left out in training (FLIP); default: as the model says."
    ] = None
    lock_image: Annotated[
        int | None, "Freeze the image tower but its last N groups; 0: all of it (LiT)."
    ] = None
    lock_text: Annotated[int | None, "Freeze the text tower but its last N groups."] = None
    loss_exchange: Annotated[
        Literal["gather", "ring"],
        "How processes meet each other's texts: all at once, or from rank to rank.",
    ] = "gather"
    ema: Annotated[
        float, "Decay of a running mean of the weights, written as a model too; 0: none."
    ] = 0.0
    seed: Annotated[int, "Seed of the weights, the order of samples and the crops."] = 0
    train_weights: Annotated[
        str, "How often a pair of each source is drawn, e.g. '2::1'; default: equally often."
    ] = ""
    replacement: Annotated[bool, "Draw samples with replacement; default: each once an epoch."] = (
        False
    )
    shuffle_shards: Annotated[
        int, "Shards open at once: samples are shuffled among this many shuffled shards."
    ] = 16
    workers: Annotated[
        int, "Loader processes per training process; 0: load in the process itself."
    ] = 4
    max_error_share: Annotated[
        float, "Stop when more than this share of samples is unreadable."
    ] = 0.05
    spike_factor: Annotated[
        float,
        "Skip a step whose gradient norm is more than this many times the mean; 0: only one that "
        "is not finite.",
    ] = 0.0
    max_skipped: Annotated[int, "Stop after this many skipped steps in a row."] = 20
    save_every: Annotated[int, "Steps between saves of the train state; the last two are kept."] = (
        500
    )
    save_minutes: Annotated[float, "Save also after this many minutes; 0: by steps alone."] = 0.0
    keep_every: Annotated[
        int,
        "Never remove the train state of every Nth step, a model directory in each; 0: keep the "
        "last two alone.",
    ] = 0
    time_limit: Annotated[
        float, "Minutes after which the state is saved and the command exits with 3; 0: none."
    ] = 0.0
    val_data: Annotated[str, "Held-out shards: loss and Recall@k."] = ""
    zeroshot_data: Annotated[
        str, "Labelled set in CLIP_benchmark's layout: zero-shot accuracy."
    ] = ""
    eval_every: Annotated[int, "Steps between validations; the last step is always one."] = 1000
    log_every: Annotated[int, "Steps between rows of metrics.jsonl."] = 10
    tracker: Annotated[
        Literal["none", "tensorboard", "wandb", "trackio"],
        "Where rows go besides metrics.jsonl; the tracker's package must be installed.",
    ] = "none"
    rebase: Annotated[
        bool,
        "Continue a run under changed settings: schedule, data, batch, precision; not its model.",
    ] = False

    def __post_init__(self) -> None:
        positive = "samples_seen batch_size shuffle_shards save_every log_every eval_every "
        for name in (positive + "max_skipped").split():
            self._require(name, getattr(self, name) >= 1, "at least 1")
        natural = "micro_batch_size warmup cooldown weight_decay grad_clip seed workers keep_every "
        for name in (natural + "save_minutes time_limit lock_image lock_text").split():
            self._require(name, (getattr(self, name) or 0) >= 0, "0 or more")
        for name in ("lr", "eps"):
            self._require(name, getattr(self, name) > 0, "more than 0")
        for name in ("beta1", "beta2", "max_error_share", "ema", "patch_dropout"):
            self._require(name, 0 <= (getattr(self, name) or 0) < 1, "at least 0 and below 1")
        spikes = self.spike_factor == 0 or self.spike_factor > 1
        self._require("spike_factor", spikes, "more than 1, or 0")
        self._require("shuffle_shards", self.shuffle_shards <= 64, "at most 64")
        fix = f"of the run's {self.steps} steps (--samples-seen / --batch-size)"
        self._require("warmup", self.warmup < self.steps, f"fewer than all {fix}")
        fits = self.warmup + self.cooldown <= self.steps
        self._require("cooldown", fits, f"at most what --warmup leaves {fix}")
        constant = self.schedule == "constant" or not self.cooldown
        self._require("cooldown", constant, "0 but for --schedule constant")

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
