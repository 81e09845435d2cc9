"""Encoded images to normalised batches: `Preprocess` against open_clip's transform.

uv run tools/bench/preprocess.py        480 x 360 JPEGs to 224; eval and train, 0 and 2 workers

Both sides take bytes from memory through a DataLoader with the default collation and end with
float32 [64, 3, 224, 224]. Theirs: PIL, RGB, open_clip's image_transform in the workers. Ours: uint8
from the workers, normalised as a batch. Workers persist, so that their start is not timed.
"""

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from clip_models import Preprocess
from interleaved import compare
from numpy.typing import NDArray
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SIZE = 224


def photo(width: int, height: int, quality: int, seed: int) -> bytes:
    """A JPEG with a photograph's spectrum: 1/f in brightness, smoother in colour."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf

    def plane(power: float, contrast: float) -> NDArray[np.uint8]:
        noise = np.fft.rfft2(rng.standard_normal((height, width)))
        values = np.fft.irfft2(noise / frequency**power, (height, width))
        return np.clip(128 + contrast * values / values.std(), 0, 255).astype(np.uint8)

    planes = np.stack([plane(1.5, 55), plane(1.7, 18), plane(1.7, 18)], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(planes, "YCbCr").convert("RGB").save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Images(Dataset[Tensor]):
    """`length` items, the given images over and over, each through `transform(data, index)`."""

    def __init__(
        self, files: list[bytes], length: int, transform: Callable[[bytes, int], Tensor]
    ) -> None:
        self.files, self.length, self.transform = files, length, transform

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.files[index % len(self.files)], index)


class Theirs:
    """PIL and open_clip's transform."""

    def __init__(self, train: bool) -> None:
        self.transform: Any = image_transform(SIZE, is_train=train)

    def __call__(self, data: bytes, index: int) -> Tensor:
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB"))


class Ours:
    """Preprocess, up to the normalisation."""

    def __init__(self, train: bool) -> None:
        self.train, self.preprocess = train, Preprocess(SIZE)

    def __call__(self, data: bytes, index: int) -> Tensor:
        return self.preprocess.train(data, index) if self.train else self.preprocess.eval(data)


@click.command()
@click.option("--images", default=256, show_default=True, help="Different images.")
@click.option("--repeat", default=4, show_default=True, help="Times through them in one call.")
@click.option("--batch-size", default=64, show_default=True, help="Images in a batch.")
@click.option("--width", default=480, show_default=True, help="Of an image, in pixels.")
@click.option("--height", default=360, show_default=True, help="Of an image, in pixels.")
@click.option("--quality", default=90, show_default=True, help="Of the JPEGs.")
@click.option("--threads", default=2, show_default=True, help="Of torch in the main process.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of each side.")
def main(
    images: int, repeat: int, batch_size: int, width: int, height: int, quality: int, threads: int,
    rounds: int,
) -> None:  # fmt: skip
    """Time the way from encoded images to batches, once both sides give the same pixels."""
    arguments = dict(click.get_current_context().params)
    torch.set_num_threads(threads)
    files = [photo(width, height, quality, seed) for seed in range(images)]
    normalize = Preprocess(SIZE).normalize
    ours = normalize(torch.stack([Ours(train=False)(data, 0) for data in files[:8]]))
    theirs = torch.stack([Theirs(train=False)(data, 0) for data in files[:8]])
    difference = (ours - theirs).abs()
    if float(difference.max()) > 2 / 255 / 0.26 or float(difference.mean()) > 1e-3:
        raise click.ClickException(f"the sides differ by up to {float(difference.max()):.3f}")

    def side(transform: Callable[[bytes, int], Tensor], workers: int) -> Callable[[], object]:
        loader = DataLoader(
            Images(files, images * repeat, transform),
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

        def ours() -> None:
            for batch in loader:
                normalize(batch)

        def theirs() -> None:
            for _ in loader:
                pass

        return ours if isinstance(transform, Ours) else theirs

    reports: dict[str, object] = {}
    for train in (False, True):
        for workers in (0, 2):
            name = f"{'train' if train else 'eval'}, {workers} workers"
            print(name, file=sys.stderr)
            reports[name] = compare(
                {"ours": side(Ours(train), workers), "open_clip": side(Theirs(train), workers)},
                rounds=rounds,
                work=images * repeat,
                unit="images",
                arguments=arguments | {"train": train, "workers": workers},
            )
    sizes = [len(data) for data in files]
    click.echo(
        json.dumps(
            {
                "mean_bytes": sum(sizes) / images,
                "difference": {"max": float(difference.max()), "mean": float(difference.mean())},
                **reports,
            }
        )
    )


if __name__ == "__main__":
    main()
