"""The quickstart's model by clip-train and by open_clip's trainer: zero-shot accuracy of both.

uv run tools/quickstart.sh && uv run tools/bench/train_accuracy.py quickstart OUT

Both start from the same weights of tools/quickstart_model.json, once for each seed, and read the
quickstart's shards for as many samples, with the quickstart's batch, rate and warm-up; AdamW,
cosine and crops are alike by default. Each goes through the data in an order of its own. A picture
there has several captions, of which clip-train draws one; open_clip's is made to draw as well,
unless --whole-captions leaves it to read all the lines as one text, as it does by itself. Its
checkpoint is converted, and `clip-probe zeroshot` scores both on concepts that training never saw.

What is in OUT is not done again, so that more seeds can be added. Figures are shares; the JSON has
those of each seed, the difference of the means in points, and the 95 % interval of one figure.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import click
import open_clip_trainer
from interleaved import machine

MODEL = Path(__file__).parents[1] / "quickstart_model.json"


class Recipe(NamedTuple):
    """What both trainers are told."""

    samples: int
    batch_size: int
    lr: float
    warmup: int
    grad_clip: float
    workers: int


def run(*command: object) -> str:
    """What a command prints; its progress passes through."""
    said = [str(part) for part in command]
    click.echo(f"$ {' '.join([Path(said[0]).name, *said[1:]])}", err=True)
    result = subprocess.run(said, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise click.ClickException(f"{said[0]}: exit code {result.returncode}; see above")
    return result.stdout


def script(name: str) -> Path:
    """One of our commands."""
    return Path(sys.executable).with_name(name)


def write_initial(path: Path, seed: int) -> None:
    """The model directory that both start from."""
    import torch
    from clip_models import CLIP, ModelConfig, Preprocess, save_model

    config = ModelConfig.from_dict(json.loads(MODEL.read_text()))
    torch.manual_seed(seed)
    save_model(path, CLIP(config), Preprocess(config.vision_cfg.image_size))


def train_ours(initial: Path, shards: Path, out: Path, recipe: Recipe, seed: int) -> Path:
    """clip-train's model directory."""
    run(
        script("clip-train"), "--model", initial, "--train-data", shards, "--output", out,
        "--samples-seen", recipe.samples, "--batch-size", recipe.batch_size,
        "--lr", recipe.lr, "--warmup", recipe.warmup, "--grad-clip", recipe.grad_clip,
        "--workers", recipe.workers, "--seed", seed, "--precision", "fp32",
    )  # fmt: skip
    return out / "model"


def train_theirs(
    initial: Path, shards: Path, out: Path, recipe: Recipe, seed: int, *, one_line: bool
) -> Path:
    """open_clip's model, converted."""
    if not (out / "model").exists():
        shutil.rmtree(out, ignore_errors=True)
        run(
            *open_clip_trainer.command(
                initial, shards, samples=recipe.samples, batch_size=recipe.batch_size,
                workers=recipe.workers, name=out.name, logs=out.parent, one_line=one_line,
                lr=recipe.lr, warmup=recipe.warmup, grad_clip_norm=recipe.grad_clip, seed=seed,
                log_every_n_steps=50,
            )
        )  # fmt: skip
        checkpoint = out / "checkpoints" / "epoch_1.pt"
        run(script("clip-models"), "convert", checkpoint, out / "model", "--architecture", MODEL)
    return out / "model"


def score(model: Path, sets: list[Path], split: str) -> dict[str, dict[str, Any]]:
    """clip-probe's rows, by SET/SPLIT."""
    lines = run(script("clip-probe"), "zeroshot", model, *sets, "--split", split).splitlines()
    rows = [json.loads(line) for line in lines]
    return {f"{Path(row['dataset']).name}/{split}": row for row in rows}


def table(name: str, shares: dict[str, list[float]]) -> str:
    """A side's accuracies, a line for each set."""
    lines = [f"  {key:<24} {'  '.join(f'{100 * v:5.1f}%' for v in shares[key])}" for key in shares]
    return "\n".join([name, *lines])


@click.command()
@click.argument("quickstart", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--samples", default=100_000, show_default=True, help="Pairs to train on.")
@click.option("--batch-size", default=128, show_default=True, help="Pairs in a step.")
@click.option("--lr", default=2e-3, show_default=True, help="Peak learning rate.")
@click.option("--warmup", default=40, show_default=True, help="Steps of warm-up.")
@click.option("--grad-clip", default=1.0, show_default=True, help="Largest gradient norm.")
@click.option("--workers", default=1, show_default=True, help="Loader processes.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0,), show_default=True,
              help="Of the weights and the order; to be given for each.")  # fmt: skip
@click.option("--whole-captions", is_flag=True, help="open_clip's trainer as it is.")
def main(
    quickstart: Path, out: Path, samples: int, batch_size: int, lr: float, warmup: int,
    grad_clip: float, workers: int, seeds: tuple[int, ...], whole_captions: bool,
) -> None:  # fmt: skip
    """Train on the shards of QUICKSTART in OUT, and score both on its sets."""
    recipe = Recipe(samples, batch_size, lr, warmup, grad_clip, workers)
    shards = (quickstart / "shards").resolve()
    sets = sorted(path.parent for path in (quickstart / "sets").glob("*/classnames.txt"))
    splits = [s for s in ("test", "test-no-flags") if all((path / s).is_dir() for path in sets)]
    theirs = "open_clip, whole captions" if whole_captions else "open_clip"
    shares: dict[str, dict[str, list[float]]] = {"ours": {}, theirs: {}}
    intervals: dict[str, list[float]] = {}
    (out := out.resolve()).mkdir(parents=True, exist_ok=True)
    if not (record := out / "recipe.json").exists():
        record.write_text(json.dumps(recipe) + "\n")
    if json.loads(record.read_text()) != list(recipe):
        raise click.ClickException(f"{out}: of other options; repeat them or choose another OUT")
    for seed in seeds:
        if not (initial := out / f"initial-{seed}").exists():
            write_initial(initial, seed)
        models = {
            "ours": train_ours(initial, shards, out / f"ours-{seed}", recipe, seed),
            theirs: train_theirs(
                initial, shards, out / f"{theirs.replace(', ', '-').replace(' ', '-')}-{seed}",
                recipe, seed, one_line=not whole_captions,
            ),
        }  # fmt: skip
        for side, model in models.items():
            for split in splits:
                for key, row in score(model, sets, split).items():
                    shares[side].setdefault(key, []).append(row["acc1"])
                    intervals.setdefault(key, row["acc1_ci95"])
    for side, found in shares.items():
        found["mean"] = [mean(values) for values in zip(*found.values(), strict=True)]
        click.echo(table(side, found), err=True)
    points = {k: 100 * (mean(v) - mean(shares[theirs][k])) for k, v in shares["ours"].items()}
    report = {"sides": shares, "points": points, "interval_95": intervals} | machine()
    click.echo(json.dumps(report | {"arguments": recipe._asdict() | {"seeds": seeds}}))


if __name__ == "__main__":
    main()
