"""Image processors and CLIP tokenizers of transformers' directories, read and written."""

import json
from pathlib import Path
from typing import Any

from clip_models.config import PreprocessConfig
from clip_models.convert_files import read_json
from clip_models.errors import ModelError
from clip_models.tokenizer import vocabulary

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_START, _END = "<|startoftext|>", "<|endoftext|>"


def read_processor(directory: Path, size: int, default: PreprocessConfig) -> PreprocessConfig:
    """The image processor's configuration in open_clip's terms; `default` where there is none.

    Raises:
        ModelError: it resizes, crops or scales in a way that open_clip's layout cannot say.
    """
    values: dict[str, Any] = {}
    for file in (directory / "processor_config.json", directory / "preprocessor_config.json"):
        if file.is_file():
            values = read_json(file)
            values = values.get("image_processor", values)
    if "image_mean" not in values:
        return default
    square = {"height": size, "width": size}
    target, crop = values.get("size", size), values.get("crop_size", size)
    cropped = values.get("do_center_crop", default.resize_mode == "shortest")
    mode = None
    if target in (size, {"shortest_edge": size}) and cropped and crop in (size, square):
        mode = "shortest"
    elif target == square and (not cropped or crop in (size, square)):
        mode = "squash"
    steps = all(values.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize"))
    interpolation = _RESAMPLE.get(values.get("resample", 3))
    usual = abs(values.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-3
    if mode is None or interpolation is None or not steps or not usual:
        raise ModelError(
            f"its image processor does more or less than to resize to {size} pixels, crop "
            f"and normalise: size {target}, crop {crop if cropped else None}, "
            f"resample {values.get('resample')}"
        )
    mean, std = values["image_mean"], values["image_std"]
    return PreprocessConfig.from_dict(
        {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": mode}
    )


def write_processor(directory: Path, size: int, config: PreprocessConfig) -> None:
    """preprocessor_config.json of a CLIPImageProcessor."""
    square = {"height": size, "width": size}
    shortest = config.resize_mode == "shortest"
    values: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if shortest else square,
        "resample": 2 if config.interpolation == "bilinear" else 3,
        "do_center_crop": shortest,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.mean,
        "image_std": config.std,
    }
    _write_json(directory / "preprocessor_config.json", values)


def has_clip_tokenizer(directory: Path) -> bool:
    """Whether a directory's tokenizer is CLIP's own; one without tokenizer files is taken to be."""
    theirs: Any = {}
    if (directory / "vocab.json").is_file():
        theirs = read_json(directory / "vocab.json")
    elif (directory / "tokenizer.json").is_file():
        theirs = read_json(directory / "tokenizer.json").get("model", {}).get("vocab", {})
    return not theirs or _words().items() <= theirs.items()


def write_tokenizer(directory: Path, context_length: int) -> None:
    """The files of a CLIPTokenizer: our vocabulary and merges under transformers' names."""
    merges = [" ".join(pair) for pair in vocabulary()[1]]
    _write_json(directory / "vocab.json", _words())
    text = "\n".join(["#version: 0.2", *merges, ""])
    (directory / "merges.txt").write_text(text, encoding="utf-8")
    values = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
    }
    _write_json(directory / "tokenizer_config.json", values)


def _words() -> dict[str, int]:
    return {word: i for i, word in enumerate([*vocabulary()[0], _START, _END])}


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
