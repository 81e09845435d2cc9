"""Linear combinations of models' weights, tensor by tensor: theta = sum of c_i theta_i.

WiSE-FT (Wortsman et al., 2109.01903, Eq. 1) and PAINT (Ilharco et al., 2208.05592) take two,
(1 - alpha) theta0 + alpha theta1; model soups (Wortsman et al., 2203.05482) take several.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from clip_models import ModelError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_finetune.errors import FinetuneError

WEIGHTS = "open_clip_model.safetensors"
_CONFIG = "open_clip_config.json"
_BYTES = {"F32": 4, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # safetensors' names


def combine(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """The sum of c_i theta_i in float64, rounded once to float32.

    So it is exact where one coefficient is 1 and the others are 0, and where all tensors are equal
    and the coefficients add up to 1. Integers (BatchNorm's counters) cannot be blended: they are
    those of the largest coefficient, the last of equals.
    """
    if not tensors[0].is_floating_point():
        order = sorted(range(len(tensors)), key=lambda i: coefficients[i])
        return tensors[order[-1]]
    total: Tensor | None = None
    for tensor, factor in zip(tensors, coefficients, strict=True):
        if factor:
            part = tensor.double() * factor
            total = part if total is None else total.add_(part)
    return torch.zeros_like(tensors[0]).float() if total is None else total.float()


def write_combination(
    models: Sequence[Path],
    coefficients: Sequence[float],
    folder: Path,
    config: dict[str, Any],
) -> bool:
    """Write the combined model into the empty `folder`; True: all text towers are the same.

    One tensor of each model is in memory at a time, whatever the models' size. The configuration,
    and the tokenizer's files, are the first model's.

    Args:
        config: what open_clip_config.json will hold.

    Raises:
        FinetuneError: weights that differ in names or shapes.
        ModelError: missing or damaged weights.
    """
    for file in models[0].iterdir():
        if file.is_file() and file.suffix in (".json", ".txt", ".model") and file.name != _CONFIG:
            shutil.copyfile(file, folder / file.name)
    same_text = True
    with ExitStack() as stack:
        readers = [_open(stack, model) for model in models]
        names = _common_names(models, readers)
        first = readers[0]
        shapes = {name: tuple(first.get_slice(name).get_shape()) for name in names}
        kinds = {name: _stored_kind(first.get_slice(name).get_dtype()) for name in names}

        def combined(name: str) -> Tensor:
            nonlocal same_text
            tensors = [cast(Tensor, reader.get_tensor(name)) for reader in readers]
            for model, tensor in zip(models, tensors, strict=True):
                if tuple(tensor.shape) != shapes[name]:
                    raise FinetuneError(
                        f"{model}: {name} has the shape {list(tensor.shape)}, {models[0]} has "
                        f"{list(shapes[name])}; expected states of one model"
                    )
            if not name.startswith("visual."):
                same_text &= all(torch.equal(tensors[0], other) for other in tensors[1:])
            return combine(tensors, coefficients)

        _write_stream(folder / WEIGHTS, names, shapes, kinds, combined)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return same_text


def _open(stack: ExitStack, model: Path) -> Any:
    file = model / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{model} has no {WEIGHTS}; `clip-models convert` makes such a directory")
    try:
        return stack.enter_context(safe_open(file, framework="pt"))
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}); copy or write it again") from error


def _common_names(models: Sequence[Path], readers: Sequence[Any]) -> list[str]:
    names = set(readers[0].keys())
    for model, reader in zip(models, readers, strict=True):
        if different := names ^ set(reader.keys()):
            name = min(different)
            holder, other = (models[0], model) if name in names else (model, models[0])
            raise FinetuneError(
                f"{holder} has the weight {name}, {other} has not; expected states of one model"
            )
    return sorted(names)


def _stored_kind(kind: str) -> str:
    """Half precision is written as float32, which the sum is."""
    return "F32" if kind.startswith(("F", "BF")) else kind


def _write_stream(
    file: Path,
    names: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    kinds: dict[str, str],
    tensor_of: Callable[[str], Tensor],
) -> None:
    """A safetensors file, written one tensor after the other; its own writer wants all at once.

    The format: the header's length in 8 bytes, the header as JSON, the tensors' bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # wide types first: nothing then lies at an odd offset for its type
    order = sorted(names, key=lambda name: (-_BYTES[kinds[name]], name))
    end = 0
    for name in order:
        start, end = end, end + _BYTES[kinds[name]] * math.prod(shapes[name])
        offsets = [start, end]
        header[name] = {"dtype": kinds[name], "shape": shapes[name], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensor_of(name).contiguous().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)
