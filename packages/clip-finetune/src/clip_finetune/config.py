"""What a fine-tuning run is: every option of `clip-finetune train`, with its default and its help.

The defaults are the OpenCLIP paper's joint recipe (section 4.4): 2,000 iterations of batch 128,
lr 1e-5 after 200 steps of warm-up, cosine to zero, AdamW with weight decay 0.1. Gradient clipping
at norm 1 is not in the paper's text but in the code it used (mlfoundations/patching).
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from clip_finetune.errors import FinetuneError


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
    head: tuple[str, ...] = _option(
        "Saved head of MODEL to train against, one for each --task in order. Default: each set's "
        "zero-shot head, from its class names and templates.",
        recipe=False,
        default=(),
    )
    train_split: str = _option("Split of each set to train on.", recipe=False, default="train")
    iterations: int = _option("Optimizer steps.", default=2000)
    batch_size: int = _option("Images a step, over all processes.", default=128)
    lr: float = _option("Peak learning rate.", default=1e-5)
    warmup: int = _option("Steps of linear warm-up, before the cosine to zero.", default=200)
    weight_decay: float = _option("AdamW's decay of weight matrices.", default=0.1)
    grad_clip: float = _option("Largest gradient norm; 0 for no clipping.", default=1.0)
    seed: int = _option("Seed of the data order and the crops.", default=0)
    precision: Literal["fp32", "bf16"] = _option(
        "Arithmetic of the image tower; weights and loss stay fp32.", default="fp32"
    )
    workers: int = _option("Processes that decode images.", recipe=False, default=4)
    save_every: int = _option(
        "Steps between saves of the train state; 0 for none but SIGTERM's.",
        recipe=False,
        default=500,
    )

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("batch_size", 1), ("warmup", 0), ("workers", 0)):
            self._at_least(name, least)
        for name in ("weight_decay", "grad_clip", "save_every", "seed"):
            self._at_least(name, 0)
        if not self.lr > 0:
            raise FinetuneError(f"--lr is {self.lr}; expected a positive learning rate")
        if self.warmup >= self.iterations:
            raise FinetuneError(
                f"--warmup {self.warmup} leaves nothing of --iterations {self.iterations}; "
                "lower the warm-up"
            )
        if self.head and len(self.head) != len(self.task):
            raise FinetuneError(
                f"{len(self.head)} --head for {len(self.task)} --task; "
                "give one for each task in order, or none for zero-shot heads"
            )

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            option = "--" + name.replace("_", "-")
            raise FinetuneError(f"{option} is {getattr(self, name)}; expected {least} or more")

    def recipe(self) -> dict[str, Any]:
        """The fields that decide the resulting weights, beside the model and the tasks."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["recipe"]}
