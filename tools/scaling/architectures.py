"""Multiply-accumulates and parameters of a model, published and in closed form."""

# w width, m MLP width, n tokens of a sequence, L layers, E embedding

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

from errors import ScalingError

PUBLISHED = Path(__file__).parent / "published"


@cache
def published(folder: Path = PUBLISHED) -> dict[str, dict[str, str]]:
    """The paper's table of architectures (arXiv 2212.07143, appendix), by name."""
    with (folder / "architectures.csv").open(encoding="utf-8", newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def published_gmacs(model: str) -> float | None:
    """GMACs of a pair as the paper has them; None for a model that it does not list."""
    row = published().get(model)
    return None if row is None else float(row["gmacs"])


def model_config(source: str) -> dict[str, Any]:
    """open_clip's `model_cfg` of a name of the paper, a JSON file or a model directory.

    Raises:
        ScalingError: no such name or file, or not a configuration.
    """
    if source in published():
        row = {k: float(v) for k, v in published()[source].items() if k != "model"}
        size = {k: int(v) for k, v in row.items()}
        vision = {"image_size": size["image_size"], "patch_size": size["patch_size"]}
        vision |= {"width": size["image_width"], "layers": size["image_layers"]}
        return {
            "embed_dim": size["embed_dim"],
            "vision_cfg": vision | {"mlp_ratio": row["image_mlp_ratio"]},
            "text_cfg": {"width": size["text_width"], "layers": size["text_layers"]},
        }
    path = Path(source)
    if path.is_dir():
        path = path / "open_clip_config.json"
    if not path.is_file():
        raise ScalingError(
            f"{source}: no file, no model directory and none of {', '.join(published())}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ScalingError(f"{path}: not JSON: {error}") from error
    config = config.get("model_cfg", config) if isinstance(config, dict) else {}
    if not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise ScalingError(f"{path}: no model_cfg with embed_dim, vision_cfg and text_cfg")
    return config


def profile(config: dict[str, Any]) -> dict[str, float]:
    """GMACs of one forward pass of one pair, and parameters, of two plain transformers.

    L (n (4 w^2 + 2 w m) + 2 n^2 w) multiply-accumulates a tower, the patches and the projections;
    softmax, norms and biases are not counted, as in the paper's table (within 0.3% of it).

    Raises:
        ScalingError: a tower that is no plain vision or text transformer, or a field of a
            wrong kind.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    for field in ("timm_model_name", "attentional_pool", "hf_model_name"):
        if vision.get(field) or text.get(field):
            raise ScalingError(f"{field}: there is no closed form for this tower")
    try:
        embed = int(config["embed_dim"])
        image = _image(vision, embed)
        words = _text(text, embed)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ScalingError(f"model_cfg: {error}; a plain vision transformer has integers") from None
    scalars = 1 if config.get("init_logit_bias") is None else 2
    return {
        "gmacs": (image[0] + words[0]) / 1e9,
        "image_gmacs": image[0] / 1e9,
        "text_gmacs": words[0] / 1e9,
        "parameters": image[1] + words[1] + scalars,
        "image_parameters": image[1],
        "text_parameters": words[1],
    }


def _image(vision: dict[str, Any], embed: int) -> tuple[int, int]:
    w, layers = int(vision.get("width", 768)), int(vision.get("layers", 12))
    patch, size = int(vision.get("patch_size", 16)), int(vision.get("image_size", 224))
    m = int(w * vision.get("mlp_ratio", 4.0))
    patches = (size // patch) ** 2
    n = patches + 1
    macs, parameters = _blocks(layers, n, w, m)
    norms = 2 * w if vision.get("no_ln_pre") else 4 * w
    scales = 0 if vision.get("ls_init_value") is None else layers * 2 * w
    patch_weights = 3 * patch * patch * w
    macs += patches * patch_weights + w * embed
    # class token and positions, w each
    return macs, parameters + patch_weights + w + n * w + norms + scales + w * embed


def _text(text: dict[str, Any], embed: int) -> tuple[int, int]:
    w, layers = int(text.get("width", 512)), int(text.get("layers", 12))
    n, words = int(text.get("context_length", 77)), int(text.get("vocab_size", 49408))
    m = int(w * text.get("mlp_ratio", 4.0))
    macs, parameters = _blocks(layers, n, w, m)
    projection = w * embed if text.get("proj_type", "linear") == "linear" else 0
    bias = embed if projection and text.get("proj_bias") else 0
    scales = 0 if text.get("ls_init_value") is None else layers * 2 * w
    return macs + projection, parameters + (words + n) * w + 2 * w + scales + projection + bias


def _blocks(layers: int, n: int, w: int, m: int) -> tuple[int, int]:
    """Multiply-accumulates and parameters of the layers: attention, MLP, two norms."""
    macs = layers * (n * (4 * w * w + 2 * w * m) + 2 * n * n * w)
    return macs, layers * (4 * w * w + 4 * w + 2 * w * m + m + w + 4 * w)
