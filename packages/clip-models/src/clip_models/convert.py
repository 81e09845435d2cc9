"""Models of others to a model directory.

What a source is, is told by what it holds: a weight file (safetensors, torch.save or TorchScript),
a directory in open_clip's layout, one of transformers', or a model of the hub in either. The result
is checked as strictly as a model directory, and written whole or not at all.
"""

import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_models.architectures import architecture as named_architecture
from clip_models.config import PreprocessConfig
from clip_models.convert_files import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    Source,
    find_weights,
    read_weights,
    sha256_of,
)
from clip_models.convert_hub import fetch, hub_name
from clip_models.convert_openai import MARKS, openai_config
from clip_models.convert_transformers import read_transformers
from clip_models.errors import ModelError
from clip_models.model_dir import (
    assemble,
    fingerprint_of,
    hf_config_of,
    read_model_config,
    refuse_existing,
    save_model,
)
from clip_models.preprocess import Preprocess
from clip_models.tokenizer import tokenizer_for

_log = logging.getLogger(__name__)

_FORMATS = {
    "checkpoint": "open_clip training checkpoint",
    "safetensors": "safetensors weights",
    "torch": "torch.save weights",
    "torchscript": "TorchScript weights",
}
# Buffers that files of older versions hold; the towers make them themselves.
_DROPPED = {"attn_mask", "text.attn_mask", "text.transformer.embeddings.position_ids", *MARKS}
_TOP_LEVEL_TEXT = (
    "token_embedding.",
    "positional_embedding",
    "transformer.",
    "ln_final.",
    "text_projection",
)


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    architecture: str | None = None,
) -> dict[str, Any]:
    """Write a model directory from a model of open_clip, OpenAI or transformers.

    Nothing of the source is run: pickles are read for their tensors only.

    Args:
        source: a file, a directory, or a hub's `org/name` or `hf-hub:org/name`.
        output: the model directory; must not exist.
        architecture: name or .json file; for a file of weights that does not say what it is.

    Returns:
        model, format (what the source was), parameters, fingerprint.

    Raises:
        ModelError: a source of no known kind, with code in it, damaged, or not of one model.
    """
    refuse_existing(output)
    path, name = Path(source), Path(source).name
    origin: dict[str, Any] = {}
    if not path.exists():
        if (repository := hub_name(str(source))) is None:
            raise ModelError(f"{source} does not exist, and is not a hub's org/name")
        path, name = fetch(repository), repository
        origin["revision"] = path.name
    found = _read_directory(path, name) if path.is_dir() else _read_file(path, architecture)
    if architecture is not None and path.is_dir():
        raise ModelError(f"{source} says itself what it is; leave out the architecture")
    _check_positions(found)
    hf_config = hf_config_of(found.config, found.home)
    model = assemble(found.config, hf_config, _state(found), found.files[0])
    origin |= {
        "converted_from": name,
        "format": found.format,
        "sha256": {file.name: sha256_of(file) for file in found.files},
        **found.provenance,
    }
    preprocess = Preprocess(found.config.vision_cfg.image_size, found.preprocess)
    save_model(output, model, preprocess, origin, tokenizer_for(found.config, found.home))
    return {
        "model": str(output),
        "format": found.format,
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": fingerprint_of(output),
    }


def _read_directory(path: Path, name: str) -> Source:
    if not (path / OPEN_CLIP_CONFIG).is_file():
        if (path / "config.json").is_file():
            return read_transformers(path, name)
        raise ModelError(
            f"{path} has neither {OPEN_CLIP_CONFIG} nor transformers' config.json; "
            "name its weight file and --architecture"
        )
    config, values = read_model_config(path)
    files = find_weights(path, (*OPEN_CLIP_WEIGHTS, *TRANSFORMERS_WEIGHTS))
    return Source(
        format="open_clip directory",
        config=config,
        weights=_memory_names(read_weights(files)[1]),
        preprocess=PreprocessConfig.from_dict(values["preprocess_cfg"]),
        files=files,
        home=path,
        provenance={"source": values["provenance"]} if "provenance" in values else {},
    )


def _read_file(file: Path, architecture: str | None) -> Source:
    kind, found = read_weights([file])
    weights = _memory_names(found)
    form, preprocess, home = _FORMATS[kind], PreprocessConfig(), None
    if openai := any(mark in found for mark in MARKS):
        form = "OpenAI TorchScript archive" if kind == "torchscript" else "OpenAI state dict"
    if architecture is not None:
        config = named_architecture(architecture)
        if openai and not config.quick_gelu:
            raise ModelError(
                f"{file} is OpenAI's, whose models need quick_gelu, and {architecture} has none; "
                "leave out the architecture, which its weights tell"
            )
    elif openai:
        config = openai_config(weights)
    elif (file.parent / OPEN_CLIP_CONFIG).is_file():
        home = file.parent
        config, values = read_model_config(home)
        preprocess = PreprocessConfig.from_dict(values["preprocess_cfg"])
    else:
        raise ModelError(
            f"{file} holds weights alone: give --architecture (a name from `clip-models list` or a "
            f".json file with open_clip's model_cfg), or put its {OPEN_CLIP_CONFIG} beside it"
        )
    return Source(form, config, weights, preprocess, [file], home)


def _memory_names(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of `CLIP` in memory: all of the text tower's under `text.`."""
    return {
        f"text.{name}" if name.startswith(_TOP_LEVEL_TEXT) else name: tensor
        for name, tensor in found.items()
        if name not in _DROPPED
    }


def _check_positions(source: Source) -> None:
    """Raises: ModelError: the same model, but for other images or captions."""
    vision, text = source.config.vision_cfg, source.config.text_cfg
    wanted = {"text.positional_embedding": text.context_length}
    if vision.timm_model_name is None and vision.patch_size is not None:
        wanted["visual.positional_embedding"] = (vision.image_size // vision.patch_size) ** 2 + 1
    for name, positions in wanted.items():
        if name in source.weights and len(source.weights[name]) != positions:
            raise ModelError(
                f"{source.files[0]} has {len(source.weights[name])} positions in {name}, where "
                f"{positions} are asked for: convert it with its own size (image_size or "
                "context_length in a .json architecture), then use `clip-models resize`"
            )


def _state(source: Source) -> dict[str, Tensor]:
    """The weights in float32; scalars without axes, which older versions gave one."""
    types = {str(t.dtype)[6:] for t in source.weights.values() if t.is_floating_point()}
    if others := sorted(types - {"float32"}):
        _log.info("%s weights become float32", ", ".join(others))
    state = {n: t.float() if t.is_floating_point() else t for n, t in source.weights.items()}
    for name in state.keys() & {"logit_scale", "logit_bias"}:
        if state[name].numel() == 1:
            state[name] = state[name].reshape(())
    return state
