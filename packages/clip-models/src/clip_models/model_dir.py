"""The model directory, the one thing all tools share: open_clip's `local-dir:` layout.

    DIR/open_clip_config.json           model_cfg, preprocess_cfg; ours: provenance
    DIR/open_clip_model.safetensors     open_clip's state-dict names
    DIR/heads/NAME.safetensors          class heads (clip_models.heads)

Written to a temporary sibling and renamed, so a reader never sees half a model; not changed once
written. Reading is strict: open_clip gives a random model where weights are missing, we never do.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_models.config import ModelConfig, PreprocessConfig
from clip_models.errors import ModelError
from clip_models.model import CLIP
from clip_models.preprocess import Preprocess
from clip_models.tokenizer import Tokenizer

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"


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
    tokenizer: Tokenizer
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
    # no memory or time for random weights that are overwritten; timm towers make buffers of theirs
    on_meta = config.vision_cfg.timm_model_name is None
    with torch.device("meta" if on_meta else "cpu"):
        model = CLIP(config)
    expected = model.state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in _read_weights(path):
        found[_memory_name(name, config)] = tensor.float() if tensor.is_floating_point() else tensor
    _check_names(path, config, expected, found)
    model.load_state_dict(found, assign=on_meta)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    try:
        preprocess = PreprocessConfig.from_dict(values["preprocess_cfg"])
    except ModelError as error:
        raise ModelError(f"{path / CONFIG_NAME}: {error}") from error
    return LoadedModel(
        path=path,
        config=config,
        model=model.to(device).eval(),
        preprocess=Preprocess(config.vision_cfg.image_size, preprocess),
        tokenizer=Tokenizer(config.text_cfg.context_length),
        fingerprint=fingerprint_of(path),
        provenance=values.get("provenance", {}),
    )


def save_model(
    path: str | os.PathLike[str],
    model: CLIP,
    preprocess: Preprocess,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write a model directory, whole or not at all.

    Args:
        path: must not exist; parents are made.
        model: on any device; the weights are stored as they are.
        preprocess: the image transform it was trained with.
        provenance: how the model came to be; must be JSON.

    Raises:
        ModelError: `path` exists.
    """
    config = {
        "model_cfg": model.config.to_dict(),
        "preprocess_cfg": {"size": preprocess.size, **asdict(preprocess.config)},
        "provenance": {"clip_models": version("clip-models"), **(provenance or {})},
    }
    state = {
        _disk_name(name, model.config): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    with _new_directory(path) as temporary:
        save_file(state, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def init_model(config: ModelConfig, path: str | os.PathLike[str], seed: int) -> dict[str, Any]:
    """Write a model directory with random weights; returns what was written.

    Raises:
        ModelError: `path` exists.
    """
    torch.manual_seed(seed)
    model = CLIP(config)
    save_model(path, model, Preprocess(config.vision_cfg.image_size), {"init_seed": seed})
    parameters = sum(p.numel() for p in model.parameters())
    return {"model": str(path), "parameters": parameters, "fingerprint": fingerprint_of(path)}


@contextmanager
def _new_directory(path: str | os.PathLike[str]) -> Generator[Path]:
    """A temporary sibling to fill, renamed to `path` at the end, removed on any error.

    Raises:
        ModelError: `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise ModelError(f"{path} exists, and model directories do not change; name another")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:  # Ctrl-C too: it is raised again, and no half of a model stays
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def fingerprint_of(path: str | os.PathLike[str]) -> str:
    """Hash of names, types, shapes and bytes of a directory's weights, in the order of names.

    Raises:
        ModelError: missing or truncated weights.
    """
    digest = hashlib.sha256()
    for name, tensor in _read_weights(Path(path)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor) in the order of names."""
    file = path / WEIGHTS_NAME
    if not file.is_file():
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f" (found {', '.join(others)}, which would have to be unpickled)" if others else ""
        raise ModelError(
            f"{path} has no {WEIGHTS_NAME}{found}; "
            "write it from open_clip with safetensors.torch.save_file(model.state_dict(), …)"
        )
    try:
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                yield name, weights.get_tensor(name)
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}); copy or write it again") from error


def _check_names(
    path: Path, config: ModelConfig, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> None:
    def listed(names: set[str]) -> str:
        shown = [_disk_name(name, config) for name in sorted(names)]
        return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")

    faults: list[str] = []
    if missing := expected.keys() - found.keys():
        faults.append(f"lacks {listed(missing)}")
    if surplus := found.keys() - expected.keys():
        faults.append(f"has the unexpected {listed(surplus)}")
    faults += [
        f"has {_disk_name(name, config)} of shape {tuple(found[name].shape)} where its config "
        f"asks for {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape != found[name].shape
    ]
    if faults:
        raise ModelError(
            f"{path / WEIGHTS_NAME} {'; '.join(faults[:3])}: "
            f"weights and {CONFIG_NAME} are not of one model"
        )


def _disk_name(name: str, config: ModelConfig) -> str:
    """open_clip's CLIP keeps the native text tower's parameters at the top level."""
    return name if config.custom_text else name.removeprefix("text.")


def _memory_name(name: str, config: ModelConfig) -> str:
    ours = config.custom_text or name.startswith("visual.") or name in ("logit_scale", "logit_bias")
    return name if ours else f"text.{name}"
