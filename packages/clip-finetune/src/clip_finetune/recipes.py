"""Published recipes by name: what each changes in the defaults of TrainConfig.

joint-8 (those defaults) and imagenet-*: OpenCLIP (2212.07143), section 4.4 and its tables of
fine-tuning hyper-parameters, done with timm: -1k straight to ImageNet-1k, -12k the stage before it.
The paper gives RandAugment's number of operations and a magnitude of 8 or 9.
wise-ft: WiSE-FT (2109.01903), appendix, and its code. lp-ft: LP-FT (2202.10054) with these figures.
flyp: FLYP (2212.00638), whose code clips nothing.
"""

from typing import Any

_JOINT: dict[str, Any] = {"iterations": 2000, "batch_size": 128, "lr": 1e-5, "warmup": 200}
_END_TO_END: dict[str, Any] = {
    "method": "end-to-end", "epochs": 10, "batch_size": 512, "lr": 3e-5, "warmup": 500,
}  # fmt: skip

# name; peak rate; batch; epochs; layer decay; EMA; weight decay; drop-path; clip; RandAug
_IMAGENET = """
imagenet-1k-B-32   1e-3  4096  50  .65  .9998  .05  .1  3  rand-m8-n2
imagenet-1k-B-16   3e-4  2048  50  .7   .9998  .05  .1  3  rand-m8-n2
imagenet-1k-L-14   6e-5  2048  50  .8   .9997  .01  .2  3  rand-m8-n3
imagenet-1k-H-14   5e-5  2048  50  .82  .9998  .02  .2  2  rand-m8-n4
imagenet-12k-B-32  1e-3  4096  60  .65  .9998  .05  .1  3  rand-m9-n2
imagenet-12k-B-16  5e-4  4096  60  .7   .9998  .05  .1  3  rand-m9-n2
imagenet-12k-L-14  5e-4  4096  60  .8   .9999  .02  .2  3  rand-m9-n2
imagenet-12k-H-14  4e-4  4096  60  .86  .9999  .02  .2  2  rand-m9-n3
"""


def _read(line: str) -> tuple[str, dict[str, Any]]:
    name, lr, batch, epochs, layer_decay, ema, decay, drop_path, clip, augment = line.split()
    return name, {
        "method": "end-to-end",
        "epochs": int(epochs),
        "batch_size": int(batch),
        "lr": float(lr),
        "warmup": 10 / int(epochs),
        "weight_decay": float(decay),
        "decay": "matrices",
        "layer_decay": float(layer_decay),
        "grad_clip": float(clip),
        "label_smoothing": 0.1,
        "drop_path": float(drop_path),
        "augment": augment,
        "random_erasing": 0.3,
        "ema": float(ema),
        "precision": "bf16",
    }


RECIPES: dict[str, dict[str, Any]] = {
    "joint-8": _JOINT,
    "wise-ft": _END_TO_END,
    "lp-ft": _END_TO_END | {"method": "lp-ft"},
    "flyp": _END_TO_END | {"method": "flyp", "lr": 1e-5, "grad_clip": 0.0},
    **dict(_read(line) for line in _IMAGENET.strip().splitlines()),
}
