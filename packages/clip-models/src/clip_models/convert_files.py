"""Weight files of others, read as data: no pickle of theirs runs, whatever it holds."""

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_models.config import ModelConfig, PreprocessConfig
from clip_models.convert_torchscript import is_torchscript, read_torchscript
from clip_models.errors import ModelError

OPEN_CLIP_CONFIG = "open_clip_config.json"
# In the order of open_clip's own preference; an index names the shards of a large model.
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.bin.index.json",
    "open_clip_pytorch_model.pt",
    "open_clip_pytorch_model.pth",
)
TRANSFORMERS_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Source:
    """What a source holds, in our terms.

    Attributes:
        format: which of the known kinds it is.
        config: the towers.
        weights: under the names of `CLIP` in memory.
        preprocess: the image transform.
        files: the weight files read.
        home: the directory that may hold a Hugging Face tokenizer and text model's configuration.
        provenance: what the source said of its own origin.
    """

    format: str
    config: ModelConfig
    weights: dict[str, Tensor]
    preprocess: PreprocessConfig
    files: list[Path]
    home: Path | None = None
    provenance: dict[str, Any] = field(default_factory=dict[str, Any])


class _Ignored:
    """Stands in for NumPy's scalars in open_clip's training checkpoints: learning rates."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_IGNORED: list[Any] = [
    (_Ignored, name)
    for name in (
        "numpy.dtype",
        "numpy.dtypes.Float64DType",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
    )
]


def read_json(file: Path) -> dict[str, Any]:
    """A file's JSON table.

    Raises:
        ModelError: it is not one.
    """
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} must hold a table, not {type(values).__name__}")
    return cast(dict[str, Any], values)


def find_weights(directory: Path, names: tuple[str, ...]) -> list[Path]:
    """The first of `names` that is there: one file, or the shards that an index lists.

    Raises:
        ModelError: there is none, or a shard is missing.
    """
    for name in names:
        if (directory / name).is_file():
            shards = shard_names(directory / name)
            if missing := [shard for shard in shards if not (directory / shard).is_file()]:
                raise ModelError(f"{directory / name} lists {missing[0]}, which is not there")
            return [directory / shard for shard in shards]
    raise ModelError(f"{directory} holds no weights; looked for {', '.join(names)}")


def shard_names(file: Path) -> list[str]:
    """The files that an index names, without folders; any other file is its own only shard."""
    if file.suffix != ".json":
        return [file.name]
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{file} has no weight_map")
    return sorted({Path(str(name)).name for name in cast(dict[str, Any], weight_map).values()})


def read_weights(files: list[Path]) -> tuple[str, dict[str, Tensor]]:
    """Kind of file ("safetensors", "torch", "checkpoint", "torchscript") and its tensors by name.

    The kind is told by content, not by name. Names lose what DistributedDataParallel and
    torch.compile put before them.

    Raises:
        ModelError: a file that is damaged, of no known kind, or holds more than tensors.
    """
    kind, weights = "", dict[str, Tensor]()
    for file in files:
        kind, found = _read_file(file)
        for name, value in found.items():
            if not isinstance(value, Tensor):
                raise ModelError(
                    f"{file} holds {name!r} of type {type(value).__name__}, where tensors belong"
                )
            weights[str(name).removeprefix("module.").replace("_orig_mod.", "")] = value
    if not weights:
        raise ModelError(f"{files[0]} holds no tensors")
    return kind, weights


def sha256_of(file: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _read_file(file: Path) -> tuple[str, dict[Any, Any]]:
    with file.open("rb") as data:
        head = data.read(9)
    # a header's length, below the format's limit of 100 MB, and a header
    if int.from_bytes(head[:8], "little") <= 100_000_000 and head[8:] == b"{":
        return "safetensors", _read_safetensors(file)
    if head.startswith(b"PK") and is_torchscript(file):
        return "torchscript", cast(dict[Any, Any], read_torchscript(file))
    if head.startswith((b"PK", b"\x80")):
        values = _read_pickle(file)
        if isinstance(inner := values.get("state_dict"), dict):
            return "checkpoint", cast(dict[Any, Any], inner)
        return "torch", values
    pointer = " (a Git LFS pointer: fetch the file itself)" if head == b"version h" else ""
    raise ModelError(f"{file} is no safetensors, torch.save or TorchScript file{pointer}")


def _read_safetensors(file: Path) -> dict[Any, Any]:
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelError(f"{file} is damaged ({error}); copy it again") from error


def _read_pickle(file: Path) -> dict[Any, Any]:
    try:
        with torch.serialization.safe_globals(_IGNORED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles in a newer protocol, which it may refuse
            values: Any = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except pickle.UnpicklingError as error:
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise ModelError(
                f"{file} asks to run {name[1]}, which is not the data of a model: refused, nothing "
                "in it has run; ask its author for safetensors"
            ) from error
        raise ModelError(f"{file} is not a file of tensors that torch.load reads safely") from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise ModelError(f"{file} is damaged ({str(error).splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds a {type(values).__name__}, not a table of tensors")
    return cast(dict[Any, Any], values)
