"""The ID/OOD curve of 11 alphas in one pass, against one evaluation and against one by one.

uv run tools/bench/finetune_curve.py                      three sets of photo-sized JPEGs, a model
                                                          so small that decoding dominates
uv run tools/bench/finetune_curve.py --architecture Ti    one for which encoding does, on a CPU

Ours: both model directories to right answers at every alpha. One evaluation: the same for a single
alpha. open_clip: for each alpha the blended weights in its model, and all sets read, decoded by its
transform and encoded once more, as WiSE-FT's code does it (which also pickles each model). All
sides decode in as many worker processes.
"""

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import click
import clip_models
import numpy as np
import open_clip
import torch
from clip_finetune import LabelledSet, open_set
from clip_finetune.config import CurveConfig
from clip_finetune.scoring import score_all
from clip_finetune.set_heads import heads_of
from clip_models import CLIP, Preprocess, load_model, save_model
from interleaved import compare
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ALPHAS = CurveConfig(id=(Path("id"),), ood=(Path("ood"),)).points
CLASSES = tuple("abcdefghij")


def write_set(path: Path, images: int, size: tuple[int, int], seed: int) -> LabelledSet:
    """A labelled set of smooth noise in JPEG."""
    (path / "test").mkdir(parents=True)
    (path / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (path / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    (path / "test" / "nshards.txt").write_text("1\n")
    rng = np.random.default_rng(seed)
    with tarfile.open(path / "test" / "0.tar", "w") as tar:
        for number in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            label = CLASSES.index(CLASSES[number % len(CLASSES)])
            members = (("jpg", buffer.getvalue()), ("cls", str(label).encode()))
            for suffix, data in members:
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return open_set(path, "test")


def ours(models: list[Path], sets: list[LabelledSet], alphas: list[float], workers: int) -> Any:
    """Right answers [alpha, image] of each set."""
    ends = load_model(models[0]), load_model(models[1])
    heads = [heads_of(*ends, data, alphas, asked="", control=False) for data in sets]
    return score_all(*ends, sets, heads, alphas, batch_size=64, workers=workers)[0]


class Decoded(Dataset[tuple[Tensor, int]]):
    """A set through open_clip's transform."""

    def __init__(self, data: LabelledSet, transform: Any) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        image = Image.open(io.BytesIO(self.data.read(row)))
        return self.transform(image), int(self.data.label_N[row])


@torch.inference_mode()
def one_by_one(models: list[Path], sets: list[LabelledSet], workers: int) -> list[Any]:
    """The same from open_clip."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{models[0]}")
    end = open_clip.create_model(f"local-dir:{models[1]}").state_dict()
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokenizer = open_clip.get_tokenizer(f"local-dir:{models[0]}")
    fills = [lambda c: f"a photo of {c}"]
    classifier = open_clip.build_zero_shot_classifier(model.eval(), tokenizer, CLASSES, fills)
    found: list[list[Any]] = [[] for _ in sets]
    for alpha in ALPHAS:
        blended = {n: (1 - alpha) * start[n] + alpha * end[n] for n in start}
        model.load_state_dict(blended)
        for data, rows in zip(sets, found, strict=True):
            hits: list[Tensor] = []
            for images, labels in DataLoader(
                Decoded(data, transform), batch_size=64, num_workers=workers
            ):
                features = model.encode_image(images, normalize=True)
                hits.append((features @ classifier).argmax(dim=1) == labels)
            rows.append(torch.cat(hits).numpy())
    return [np.stack(rows) for rows in found]


@click.command()
@click.option("--architecture", default="XS", show_default=True, help="The model.")
@click.option("--sets", "count", default=3, show_default=True, help="Labelled sets.")
@click.option("--images", default=400, show_default=True, help="Of each set.")
@click.option("--width", default=1024, show_default=True, help="Of an image, 4:3.")
@click.option("--workers", default=1, show_default=True, help="Decoding processes.")
@click.option("--threads", default=2, show_default=True, help="Of torch.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of each side.")
@click.option("--seed", default=0, show_default=True, help="Of weights and images.")
def main(
    architecture: str,
    count: int,
    images: int,
    width: int,
    workers: int,
    threads: int,
    rounds: int,
    seed: int,
) -> None:
    """Time a curve, once both tools give the same right answers."""
    arguments = dict(click.get_current_context().params)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    towers = clip_models.architecture(architecture)
    with tempfile.TemporaryDirectory() as folder:
        models = [Path(folder) / name for name in ("base", "tuned")]
        clip = CLIP(towers)
        save_model(models[0], clip, Preprocess(towers.vision_cfg.image_size))
        with torch.no_grad():
            for parameter in clip.visual.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        save_model(models[1], clip, Preprocess(towers.vision_cfg.image_size))
        size = (width, 3 * width // 4)
        sets = [write_set(Path(folder) / f"set-{n}", images, size, seed + n) for n in range(count)]
        mine, theirs = ours(models, sets, ALPHAS, workers), one_by_one(models, sets, workers)
        differ = float(np.mean([a != b for a, b in zip(mine, theirs, strict=True)]))
        if differ > 0.02:  # their resizing is a level off ours here and there
            raise click.ClickException(f"{differ:.1%} of the answers differ")
        report = compare(
            {
                "ours": lambda: ours(models, sets, ALPHAS, workers),
                "open_clip, one by one": lambda: one_by_one(models, sets, workers),
                "ours, one alpha": lambda: ours(models, sets, [1.0], workers),
            },
            rounds=rounds,
            warmup=0,  # the check was
            work=count * images,
            unit="images",
            arguments=arguments,
        )
    of_one = report["sides"]["ours"]["median"] / report["sides"]["ours, one alpha"]["median"]
    click.echo(json.dumps({**report, "times_one_evaluation": of_one, "answers_differ": differ}))


if __name__ == "__main__":
    main()
