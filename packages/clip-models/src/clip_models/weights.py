"""The weights of a model directory: their file, their names on disk and in memory, their hash."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_models.config import ModelConfig
from clip_models.errors import ModelError

WEIGHTS_NAME = "open_clip_model.safetensors"
# a buffer of transformers before 4.31 that directories of then still hold; open_clip drops it too
_POSITION_IDS = "text.transformer.embeddings.position_ids"


def fingerprint_of(path: str | os.PathLike[str]) -> str:
    """Hash of names, types, shapes and bytes of a directory's weights, in the order of names.

    Raises:
        ModelError: missing or truncated weights.
    """
    digest = hashlib.sha256()
    for name, tensor in read_weights(Path(path)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor) in the order of names."""
    file = path / WEIGHTS_NAME
    if not file.is_file():
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        found = f" (found {', '.join(others)}, which would have to be unpickled)" if others else ""
        raise ModelError(
            f"{path} has no {WEIGHTS_NAME}{found}; `clip-models convert` makes such a directory"
        )
    try:
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                yield name, weights.get_tensor(name)
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}); copy or write it again") from error


def name_faults(expected: Iterable[str], found: Iterable[str]) -> list[str]:
    """What names are missing and what names are surplus, in words; nothing where all is well."""

    def listed(names: set[str]) -> str:
        shown = sorted(names)
        return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")

    faults: list[str] = []
    if missing := set(expected) - set(found):
        faults.append(f"lacks {listed(missing)}")
    if surplus := set(found) - set(expected):
        faults.append(f"has the unexpected {listed(surplus)}")
    return faults


def check_names(
    file: Path, config: ModelConfig, expected: dict[str, Tensor], found: dict[str, Tensor]
) -> None:
    """Compare the weights found in `file` with the model's, both by their names in memory.

    Raises:
        ModelError: a weight is missing, surplus or mis-shaped.
    """
    faults = name_faults(
        [disk_name(name, config) for name in expected], [disk_name(name, config) for name in found]
    )
    faults += [
        f"has {disk_name(name, config)} of shape {tuple(found[name].shape)} where its config "
        f"asks for {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape != found[name].shape
    ]
    if faults:
        raise ModelError(
            f"{file} {'; '.join(faults[:3])}: weights and configuration are not of one model"
        )


def disk_name(name: str, config: ModelConfig) -> str:
    """open_clip's CLIP keeps the native text tower's parameters at the top level."""
    return name if config.text_prefixed else name.removeprefix("text.")


def memory_state(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A directory's weights under the names of `CLIP`, in float32.

    Raises:
        ModelError: missing or truncated weights.
    """
    return {
        _memory_name(name, config): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in read_weights(path)
        if name != _POSITION_IDS
    }


def _memory_name(name: str, config: ModelConfig) -> str:
    ours = (
        config.text_prefixed or name.startswith("visual.") or name in ("logit_scale", "logit_bias")
    )
    return name if ours else f"text.{name}"
