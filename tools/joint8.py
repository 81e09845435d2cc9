"""The paper's joint fine-tuning and patching (section 4.4), on eight small tasks and two cores.

    python tools/joint8.py quickstart OUT

Makes eight tasks from the quickstart's pictures and scikit-learn's, each with splits train, val and
test of different concepts, digits or halves of a photograph, and a control set of what the model
was trained for. Each is a task to patch in PAINT's sense (arXiv 2208.05592, section 3): a linear
probe beats zero-shot by over ten points. Then only calls the commands: `clip-finetune train
--recipe joint-8`, scaled down, and `clip-finetune curve`, which chooses alpha on val and reports
test. A step whose result is there is skipped.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_digits, load_sample_images

SIZE = 72  # pixels, the demo's
SPLITS = ("train", "val", "test")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = {
    "twemoji": "flat drawing",
    "openmoji": "drawing with dark outlines",
    "noto": "drawing with shades",
    "openmoji-lines": "drawing of lines alone",
}
PROMPTS = {
    "negatives": "an emoji of {c}",
    "sideways": "an emoji of {c}",
    "specks": "an emoji of {c}",
    "blurs": "an emoji of {c}",
    "styles": "a {c}",
    "counts": "{c} emoji in one picture",
    "digits": "the number {c}",
    "photos": "a photo of a {c}",
    "control": "an emoji of {c}",
}
TASKS = [name for name in PROMPTS if name != "control"]
Picture = tuple[str, str, Image.Image]  # split, class, image


def concepts(demo: Path) -> Iterator[tuple[str, str, str]]:
    """(split, category, name of the picture) of each concept; val and test were held out of CLIP's
    training, and are told apart by a hash."""
    for split in ("train", "test"):
        file = demo / f"categories-twemoji-{split}.jsonl"
        for row in map(json.loads, file.read_text().splitlines()):
            name = Path(row["image"]).name
            even = sha256(row["concept"].encode()).digest()[0] % 2 == 0
            yield "val" if split == "test" and even else split, row["category"], name


def emoji(demo: Path, style: str, name: str) -> Image.Image | None:
    file = demo / style / name
    return Image.open(file).convert("RGB") if file.exists() else None


def speck(drawing: Image.Image) -> Image.Image:
    """A third as wide and as high, in the middle."""
    sheet = Image.new("RGB", (SIZE, SIZE), "white")
    sheet.paste(drawing.resize((SIZE // 3, SIZE // 3)), (SIZE // 3, SIZE // 3))
    return sheet


CHANGES = {
    "negatives": ImageOps.invert,
    "sideways": lambda drawing: drawing.rotate(90),
    "specks": speck,
    "blurs": lambda drawing: drawing.filter(ImageFilter.GaussianBlur(5)),
}


def pictures(task: str, demo: Path) -> Iterator[Picture]:
    """Every picture of a task."""
    if task == "photos":
        yield from photos()
    elif task == "digits":
        yield from digits()
    else:
        rows = list(concepts(demo))
        for number, (split, category, name) in enumerate(rows):
            for label, picture in drawn(task, demo, rows, number, category, name):
                if picture is not None:
                    yield split, label, picture


def drawn(
    task: str, demo: Path, rows: list[tuple[str, str, str]], number: int, category: str, name: str
) -> Iterator[tuple[str, Image.Image | None]]:
    """(class, picture) of one concept."""
    if task == "control":  # the last two by artists whose colours training never saw
        if rows[number][0] != "train":
            for style in ("twemoji", "twemoji-inked", "twemoji-lines", "openmoji", "noto"):
                yield category, emoji(demo, style, name)
    elif task in CHANGES:
        for style in ("twemoji", "openmoji", "noto"):
            drawing = emoji(demo, style, name)
            yield category, drawing and CHANGES[task](drawing)
    elif task == "styles":
        style = list(STYLES)[number % len(STYLES)]
        yield STYLES[style], emoji(demo, style, name)
    else:
        yield NUMBERS[1 + number % 4], counted(demo, rows, number)


def counted(demo: Path, rows: list[tuple[str, str, str]], number: int) -> Image.Image:
    """One to four concepts of a split on a sheet, in corners that change."""
    sheet, half = Image.new("RGB", (SIZE, SIZE), "white"), SIZE // 2
    same_split = [name for split, _, name in rows if split == rows[number][0]]
    for part in range(1 + number % 4):
        small = emoji(demo, "twemoji", same_split[(number + 7 * part) % len(same_split)])
        corner = (part + number // 4) % 4
        if small is not None:
            sheet.paste(small.resize((half, half)), (half * (corner % 2), half * (corner // 2)))
    return sheet


def digits() -> Iterator[Picture]:
    data = load_digits()
    for number, (pixels, digit) in enumerate(zip(data.images, data.target, strict=True)):
        split = SPLITS[min(2, number // 800)] if number < 1200 else "test"
        grey = Image.fromarray(np.clip(pixels * 16, 0, 255).astype(np.uint8))
        picture = grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
        yield split, NUMBERS[digit], picture


def photos() -> Iterator[Picture]:
    """Patches of two photographs: training sees their left halves alone."""
    for label, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for top in range(0, pixels.shape[0] - SIZE, 24):
            for left in range(0, pixels.shape[1] - SIZE, 24):
                middle = pixels.shape[1] // 2
                if left + SIZE <= middle:
                    split = "train"
                elif left >= middle:
                    split = "val" if top + SIZE <= pixels.shape[0] // 2 else "test"
                else:
                    continue
                patch = pixels[top : top + SIZE, left : left + SIZE]
                yield split, label, Image.fromarray(patch)


def make_set(task: str, demo: Path, out: Path, limit: int) -> Path:
    """The labelled set of a task, by `clip-data build` from folders of pictures."""
    path = out / "sets" / task
    if path.is_dir():
        return path
    images, building = out / "images" / task, out / f".{task}"
    for leftover in (images, building):
        shutil.rmtree(leftover, ignore_errors=True)
    counts: dict[str, int] = {}
    for split, label, picture in pictures(task, demo):
        count = counts[split] = counts.get(split, 0) + 1
        if count <= limit:
            file = images / split / label / f"{count:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    (images / "templates.txt").write_text(PROMPTS[task] + "\n")
    names = sorted({folder.name for split in counts for folder in (images / split).iterdir()})
    (images / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    from clip_data.cli import main as clip_data  # in this process: 26 starts would take longer

    for split in counts:
        words = ["build", images / split, building, "--split", split, "--workers", 1]
        words += ["--classnames", images / "classnames.txt"]
        words += ["--templates", images / "templates.txt", "--shuffle-seed", 0]
        clip_data([str(word) for word in words], standalone_mode=False)
    path.parent.mkdir(exist_ok=True)
    building.rename(path)
    return path


def call(*words: object) -> Any:
    """A command's JSON."""
    print("$ clip-finetune", *words, file=sys.stderr)
    command = [sys.executable, "-m", "clip_finetune", *map(str, words)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def in_points(share: float) -> float:
    return round(100 * share, 1)


@click.command(help=__doc__)
@click.argument("quickstart", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--iterations", default=1200, show_default=True, help="Of training.")
@click.option("--batch-size", default=64, show_default=True, help="Images a step.")
@click.option("--lr", default=3e-4, show_default=True, help="Peak rate; the model is a small one.")
@click.option("--seed", default=0, show_default=True, help="Of training.")
@click.option("--limit", default=10**6, help="Pictures of a task and split, for the tests.")
def main(
    quickstart: Path, out: Path, iterations: int, batch_size: int, lr: float, seed: int, limit: int
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sys.stdout, stdout = sys.stderr, sys.stdout  # of clip-data's JSON; ours comes last, alone
    sets = {task: make_set(task, quickstart / "demo", out, limit) for task in PROMPTS}
    sys.stdout = stdout
    model, tuned = quickstart / "run" / "model", out / "tuned"
    options = ["--iterations", iterations, "--warmup", 0.1, "--batch-size", batch_size, "--lr", lr]
    tasks = [word for task in TASKS for word in ("--task", sets[task])]
    call("train", model, tuned, "--recipe", "joint-8", *tasks, *options, "--seed", seed,
         "--workers", 1)  # fmt: skip
    ids = [word for task in TASKS for word in ("--id", sets[task])]
    # half of the point that patching may cost: on so few pictures val is off by as much
    curve = call("curve", model, tuned, out / "curve", *ids, "--control", sets["control"],
                 "--max-loss", 0.5, "--workers", 1)  # fmt: skip
    points = {point["alpha"]: point["test"]["sets"] for point in curve["points"]}
    alpha = curve["chosen"]["alpha"]
    table = {
        name: {
            "zero-shot": in_points(points[0.0][name]["accuracy"]),
            "fine-tuned": in_points(points[1.0][name]["accuracy"]),
            "patched": in_points(points[alpha][name]["accuracy"]),
        }
        for name in PROMPTS
    }
    for name, row in table.items():
        figures = "  ".join(f"{what} {share:5.1f}%" for what, share in row.items())
        print(f"{name:<20} {figures}", file=sys.stderr)
    control = [points[a]["control"]["accuracy"] for a in (0.0, alpha)]
    improved = [table[t]["patched"] > table[t]["zero-shot"] for t in TASKS]
    tuned_better = [table[t]["fine-tuned"] > table[t]["zero-shot"] for t in TASKS]
    report = {
        "alpha": alpha,
        "accuracy": table,
        "fine_tuned_tasks_improved": sum(tuned_better),
        "patched_tasks_improved": sum(improved),
        "control_points_lost": in_points(control[0] - control[1]),
    }
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
