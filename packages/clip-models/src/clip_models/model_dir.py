"""The model directory, the one thing all tools share: open_clip's `local-dir:` layout.

    DIR/open_clip_config.json           model_cfg, preprocess_cfg; ours: provenance
    DIR/open_clip_model.safetensors     open_clip's state-dict names
    DIR/config.json, tokenizer files    of a Hugging Face text model, or the tokenizer's alone
    DIR/heads/NAME.safetensors          class heads (clip_models.heads)

Written to a temporary sibling and renamed, so a reader never sees half a model; not changed once
written. Reading is strict: open_clip gives a random model where weights are missing, we never do.
"""

import json
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from clip_models.config import ModelConfig, PreprocessConfig
from clip_models.errors import ModelError
from clip_models.hf_tokenizer import HFTokenizer
from clip_models.model import CLIP
from clip_models.preprocess import Preprocess
from clip_models.tokenizer import Tokenizer, tokenizer_for
from clip_models.weights import (
    WEIGHTS_NAME,
    check_names,
    disk_name,
    fingerprint_of,
    memory_state,
)

CONFIG_NAME = "open_clip_config.json"
HF_CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class LoadedModel:
    """A model directory in memory.

    Attributes:
        path: the directory.
        config: the towers.
        model: float32, in eval mode.
        preprocess: the model's own image transform.
        tokenizer: the model's own tokenizer.
        fingerprint: hash of the weights; heads and indexes record it.
        provenance: what the writer said of the model's origin; empty in directories of others.
    """

    path: Path
    config: ModelConfig
    model: CLIP
    preprocess: Preprocess
    tokenizer: Tokenizer | HFTokenizer
    fingerprint: str
    provenance: dict[str, Any]


def read_model_config(path: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """The towers' configuration and the whole JSON file, without touching the weights.

    Raises:
        ModelError: no model directory, or a field that is missing, unknown or not supported.
    """
    file = Path(path) / CONFIG_NAME
    if not file.is_file():
        raise ModelError(
            f"{path} is not a model directory: it has no {CONFIG_NAME}; "
            "make one with `clip-models init` or `clip-train`, or name one in open_clip's layout"
        )
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}; write the directory again") from error
    if not isinstance(values, dict) or not {"model_cfg", "preprocess_cfg"} <= values.keys():
        raise ModelError(f"{file} must hold a table with model_cfg and preprocess_cfg")
    values = cast(dict[str, Any], values)
    try:
        return ModelConfig.from_dict(values["model_cfg"]), values
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error


def load_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedModel:
    """Read a model directory, ours or one of open_clip's with safetensors weights.

    Weights stored in half precision become float32.

    Raises:
        ModelError: anything missing, surplus, mis-shaped, truncated or unknown, by name.
    """
    path = Path(path)
    config, values = read_model_config(path)
    tokenizer = tokenizer_for(config, path)
    state = memory_state(path, config)
    model = assemble(config, hf_config_of(config, path), state, path / WEIGHTS_NAME)
    try:
        preprocess = PreprocessConfig.from_dict(values["preprocess_cfg"])
    except ModelError as error:
        raise ModelError(f"{path / CONFIG_NAME}: {error}") from error
    return LoadedModel(
        path=path,
        config=config,
        model=model.to(device),
        preprocess=Preprocess(config.vision_cfg.image_size, preprocess),
        tokenizer=tokenizer,
        fingerprint=fingerprint_of(path),
        provenance=values.get("provenance", {}),
    )


def assemble(config: ModelConfig, hf_config: Any, state: dict[str, Tensor], file: Path) -> CLIP:
    """A model with these weights, in eval mode.

    Args:
        config: of the model.
        hf_config: of a Hugging Face text model; None in other models.
        state: under the names of `CLIP`; the model may keep these very tensors.
        file: where they come from, for messages.

    Raises:
        ModelError: a weight is missing, surplus or mis-shaped.
    """
    # no memory or time for random weights that are overwritten; timm towers make buffers of theirs
    on_meta = config.vision_cfg.timm_model_name is None
    with torch.device("meta" if on_meta else "cpu"):
        model = CLIP(config, hf_config)
    check_names(file, config, model.state_dict(), state)
    model.load_state_dict(state, assign=on_meta)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def save_model(
    path: str | os.PathLike[str],
    model: CLIP,
    preprocess: Preprocess,
    provenance: dict[str, Any] | None = None,
    tokenizer: Tokenizer | HFTokenizer | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model directory, whole or not at all.

    Args:
        path: must not exist; parents are made.
        model: on any device; the weights are stored as they are.
        preprocess: the image transform it was trained with.
        provenance: how the model came to be; must be JSON.
        tokenizer: the model's; its files are written where it is a Hugging Face one, and CLIP's
            need not be given.
        state: weights to write in place of the model's own, by the names of its state dict: an
            average of them, or what the shards of several processes come to.

    Raises:
        ModelError: `path` exists, or no tokenizer is given and the model's is a Hugging Face one.
    """
    named = model.config.text_cfg.hf_tokenizer_name
    if named is not None and not isinstance(tokenizer, HFTokenizer):
        raise ModelError(f"a model with the tokenizer {named!r} is saved with it: give tokenizer")
    config = {
        "model_cfg": model.config.to_dict(),
        "preprocess_cfg": {"size": preprocess.size, **asdict(preprocess.config)},
        "provenance": {"clip_models": version("clip-models"), **(provenance or {})},
    }
    weights = {
        disk_name(name, model.config): tensor.detach().cpu().contiguous()
        for name, tensor in (model.state_dict() if state is None else state).items()
    }
    with new_directory(path) as temporary:
        save_file(weights, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        if isinstance(tokenizer, HFTokenizer):
            tokenizer.save(temporary)
        if model.config.text_cfg.hf_model_name is not None:
            hf_config: str = cast(Any, model.text).hf_config.to_json_string()
            (temporary / HF_CONFIG_NAME).write_text(hf_config, encoding="utf-8")
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def init_model(config: ModelConfig, path: str | os.PathLike[str], seed: int) -> dict[str, Any]:
    """Write a model directory with random weights; returns what was written.

    A Hugging Face text model starts with its own weights unless `hf_model_pretrained` is false.

    Raises:
        ModelError: `path` exists, or a Hugging Face model, tokenizer or its weights cannot be read.
    """
    tokenizer = tokenizer_for(config)
    torch.manual_seed(seed)
    model = CLIP(config)
    text, origin = config.text_cfg, dict[str, Any](init_seed=seed)
    if text.hf_model_name is not None:
        origin["text_weights"] = text.hf_model_name if text.hf_model_pretrained else "random"
    save_model(path, model, Preprocess(config.vision_cfg.image_size), origin, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    written = {"model": str(path), "parameters": parameters, "fingerprint": fingerprint_of(path)}
    return written | origin


def hf_config_of(config: ModelConfig, path: Path | None) -> Any:
    """The Hugging Face text model's own configuration: the directory's, if any, else by name.

    None where the text tower is a native one.

    Raises:
        ModelError: it is in neither place.
    """
    name = config.text_cfg.hf_model_name
    if name is None:
        return None
    from clip_models.hf_text_tower import read_hf_config  # transformers takes seconds to import

    if path is None:
        return read_hf_config(name)
    if (path / HF_CONFIG_NAME).is_file():
        return read_hf_config(path)
    try:
        return read_hf_config(name)
    except ModelError as error:
        raise ModelError(
            f"{path} has no {HF_CONFIG_NAME}, and {error}; put {name}'s {HF_CONFIG_NAME} there"
        ) from error


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raises: ModelError: `path` exists."""
    if Path(path).exists():
        raise ModelError(f"{path} exists, and model directories do not change; name another")


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Generator[Path]:
    """A temporary sibling to fill, renamed to `path` at the end, removed on any error.

    Raises:
        ModelError: `path` exists.
    """
    refuse_existing(path)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:  # Ctrl-C too: it is raised again, and no half of a model stays
        shutil.rmtree(temporary, ignore_errors=True)
        raise
