"""What a run is: every option of `clip-finetune train` and `curve`, with its default and its help.

The defaults of `train` are the OpenCLIP paper's joint recipe (section 4.4): 2,000 iterations of
batch 128, lr 1e-5 after 200 steps of warm-up, cosine to zero, AdamW with weight decay 0.1. Gradient
clipping at norm 1, and decay of vectors too, are not in the paper's text but in the code it used
(mlfoundations/patching).
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from clip_finetune.errors import FinetuneError

FIXED_ALPHA = 0.5  # WiSE-FT's recommendation where nothing can be chosen


def _option(text: str, *, recipe: bool = True, **default: Any) -> Any:
    """A field that becomes an option. `recipe`: a change of it gives another model."""
    return field(metadata={"help": text, "recipe": recipe}, **default)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run.

    `task`, `head` and `train_split` are left out of `recipe()`: the run records what they held
    (see `tasks.Task.describe`), so a set that was moved is the same set.
    """

    task: tuple[Path, ...] = _option(
        "Labelled set to fine-tune on; repeat it to train jointly, batches alternate.",
        recipe=False,
    )
    method: Literal["frozen-head", "end-to-end", "lp-ft", "flyp"] = _option(
        "frozen-head: the image tower, against heads that stay; end-to-end: image tower and heads "
        "(WiSE-FT); lp-ft: the same from a probe's head, which --head names; flyp: both towers, "
        "contrastively on the classes' prompts.",
        default="frozen-head",
    )
    head: tuple[str, ...] = _option(
        "Saved head of MODEL to start from, one for each --task in order; classes are matched by "
        "name. Default: each set's zero-shot head, from its class names and templates.",
        recipe=False,
        default=(),
    )
    train_split: str = _option("Split of each set to train on.", recipe=False, default="train")
    iterations: int = _option("Optimizer steps.", default=2000)
    epochs: float = _option(
        "Passes over all tasks, in place of --iterations; 0: none.", default=0.0
    )
    batch_size: int = _option("Images a step, over all processes.", default=128)
    lr: float = _option("Peak learning rate.", default=1e-5)
    warmup: float = _option(
        "Steps of linear warm-up, before the cosine to zero; below 1: this share of all steps.",
        default=200.0,
    )
    weight_decay: float = _option("AdamW's weight decay.", default=0.1)
    decay: Literal["all", "matrices"] = _option(
        "What decays: all, as in WiSE-FT's code; or no biases, gains and position embeddings, as "
        "in timm.",
        default="all",
    )
    layer_decay: float = _option(
        "Factor on the learning rate from each layer to the one below it; 1: one rate for all.",
        default=1.0,
    )
    grad_clip: float = _option("Largest gradient norm; 0 for no clipping.", default=1.0)
    label_smoothing: float = _option("Share of the target spread over all classes.", default=0.0)
    drop_path: float = _option(
        "Share of images that skip the last block's branches; less in the blocks below it.",
        default=0.0,
    )
    augment: str = _option(
        "timm's augmentation policy, e.g. rand-m9-n2-inc1, with its crops of 8-100% and flips; "
        "default: CLIP's crops of 90-100%.",
        default="",
    )
    random_erasing: float = _option("Share of images with a random box erased.", default=0.0)
    ema: float = _option(
        "Decay of a running mean of the weights, which OUT then holds; 0: none.", default=0.0
    )
    image_size: int = _option(
        "Train, and from then on encode, images of this many pixels; 0: the model's own.", default=0
    )
    seed: int = _option("Seed of the data order and the crops.", default=0)
    precision: Literal["fp32", "bf16"] = _option(
        "Arithmetic of the towers; weights and loss stay fp32.", default="fp32"
    )
    grad_checkpointing: bool = _option(
        "Keep no activations within blocks: the same result in less memory, for a third more work.",
        recipe=False,
        default=False,
    )
    workers: int = _option("Processes that decode images.", recipe=False, default=4)
    save_every: int = _option(
        "Steps between saves of the train state; 0 for none but SIGTERM's.",
        recipe=False,
        default=500,
    )

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        natural = "epochs warmup weight_decay grad_clip image_size seed workers save_every"
        for name in natural.split():
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        for name in ("label_smoothing", "drop_path", "ema"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("random_erasing", 0 <= self.random_erasing <= 1, "from 0 to 1")
        self._require("layer_decay", 0 < self.layer_decay <= 1, "above 0, at most 1")
        self._require("lr", 0 < self.lr < math.inf, "a positive learning rate")
        whole = self.warmup < 1 or self.warmup == int(self.warmup)
        self._require("warmup", whole, "whole steps, or a share below 1")
        if not self.task:
            raise FinetuneError("no --task to train on; name a labelled set")
        if self.head and len(self.head) != len(self.task):
            raise FinetuneError(
                f"{len(self.head)} --head for {len(self.task)} --task; "
                "give one for each task in order, or none for zero-shot heads"
            )
        if self.method == "lp-ft" and not self.head:
            raise FinetuneError(
                "--method lp-ft starts from a probe's head, and no --head is given; make one with "
                "clip-probe sweep --feature post --save-head NAME"
            )
        if self.method == "flyp" and (self.head or self.label_smoothing):
            raise FinetuneError(
                "--method flyp trains on prompts: it takes no --head and no --label-smoothing"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            option = "--" + name.replace("_", "-")
            raise FinetuneError(f"{option} is {getattr(self, name)}; expected {expected}")

    def schedule(self, samples: int) -> tuple[int, int]:
        """(steps, of them warm-up) of a run on tasks of so many samples together.

        Raises:
            FinetuneError: the warm-up leaves no step.
        """
        steps = math.ceil(self.epochs * samples / self.batch_size) or self.iterations
        warmup = int(self.warmup if self.warmup >= 1 else self.warmup * steps)
        if warmup >= steps:
            what = f"--epochs {self.epochs:g}, {steps} steps" if self.epochs else f"{steps} steps"
            raise FinetuneError(f"--warmup {warmup} leaves nothing of {what}; lower the warm-up")
        return steps, warmup

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the resulting weights, beside the model and the tasks."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["recipe"]}


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """One ID/OOD curve."""

    id: tuple[Path, ...] = _option("Labelled set tuned on; repeat it for joint tasks.")
    ood: tuple[Path, ...] = _option(
        "Labelled set under a shift; repeat it for several.", default=()
    )
    control: tuple[Path, ...] = _option(
        "Labelled set that --rule lets lose at most --max-loss (patching); repeat it for several.",
        default=(),
    )
    max_loss: float = _option("Points that each control set may lose on --val-split.", default=1.0)
    head: str = _option(
        "Head of FINETUNED that scores every set, classes matched by name. Default: each set's own "
        "zero-shot head, or the trained head that has its classes.",
        default="",
    )
    alphas: str = _option("Points of the curve.", default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1")
    extrapolate: bool = _option("Allow alphas outside 0 to 1.", default=False)
    split: str = _option("Split that is reported.", default="test")
    val_split: str = _option("Split that chooses alpha.", default="val")
    rule: Literal["best-id", "best-mean", "fixed"] = _option(
        "Chosen alpha: best on ID, best mean of ID and OOD (both on --val-split, and within "
        "--max-loss on every control set), or 0.5.",
        default="best-id",
    )
    batch_size: int = _option("Images encoded at once.", default=64)
    workers: int = _option("Processes that decode images.", default=4)
    device: str = _option("cpu, cuda, …  Default: cuda where there is one.", default="")

    def __post_init__(self) -> None:
        alphas = self.points
        finite = all(map(math.isfinite, alphas))
        if not finite or len(set(alphas)) != len(alphas) or not {0.0, 1.0} <= set(alphas):
            raise FinetuneError(f"--alphas {self.alphas}: expected each once, with both ends 0, 1")
        if not (self.extrapolate or all(0 <= alpha <= 1 for alpha in alphas)):
            raise FinetuneError(f"--alphas {self.alphas}: beyond 0 to 1 only with --extrapolate")
        if self.rule == "fixed" and FIXED_ALPHA not in alphas:
            raise FinetuneError(f"--rule fixed takes alpha {FIXED_ALPHA}; add it to --alphas")
        if self.rule == "best-mean" and not self.ood:
            raise FinetuneError("--rule best-mean is of ID and OOD: name a shifted set with --ood")
        if not (self.ood or self.control):
            raise FinetuneError("nothing to set against --id: name a set with --ood or --control")
        if self.rule != "fixed" and self.split == self.val_split:
            raise FinetuneError(
                f"--val-split and --split are both {self.split!r}: alpha would be chosen on the "
                "data it is reported on; name another split, or use --rule fixed"
            )
        if self.batch_size < 1 or self.workers < 0 or not 0 <= self.max_loss < math.inf:
            raise FinetuneError("--batch-size takes 1 or more, --workers and --max-loss 0 or more")

    @property
    def points(self) -> list[float]:
        """The alphas, in the order given."""
        try:
            return [float(part) for part in self.alphas.split(",")]
        except ValueError as error:
            raise FinetuneError(
                f"--alphas {self.alphas!r}: expected numbers with commas between"
            ) from error
