"""TorchScript archives read as data.

`torch.jit.load` would compile and run what an archive brings, and `torch.load(weights_only=True)`
refuses them. Their weights are a pickle of plain attributes beside raw storages, which a few lines
read: objects become bags of attributes, and nothing of the archive is called.
"""

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from clip_models.errors import ModelError

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_DEEPEST = 50  # modules within modules; a file that holds itself goes on for ever


def is_torchscript(file: Path) -> bool:
    """Whether a zip archive was written by torch.jit.save."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(_is_entry(name, "constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript module by their state-dict names.

    Raises:
        ModelError: the archive is damaged, or its pickle names anything but tensors and modules.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            root = next(n for n in archive.namelist() if _is_entry(n, "data.pkl"))[
                : -len("data.pkl")
            ]
            module: Any = _Unpickler(archive, root).load()
            return dict(_tensors(module, "", 0))
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    except Exception as error:  # a pickle of nonsense raises nearly anything
        raise ModelError(f"{file} is a damaged TorchScript archive ({error})") from error


def _is_entry(name: str, last: str) -> bool:
    return name.count("/") == 1 and name.endswith(f"/{last}")


class _Attributes:
    """Any object of the archive: its attributes, no code."""

    values: Any = None

    def __setstate__(self, values: Any) -> None:
        self.values = values


class _Unpickler(pickle.Unpickler):
    """Knows tensors, tables and attribute bags; refuses every other name."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}
        if f"{root}byteorder" in archive.namelist():
            order = archive.read(f"{root}byteorder").decode()
            if order != sys.byteorder:
                raise ModelError(f"a TorchScript archive of {order}-endian numbers")

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name.startswith("__torch__"):
            return _Attributes
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch.jit._pickle", "restore_type_tag"): self._untyped,
            **{("torch.jit._pickle", f"build_{of}list"): list for of in _LISTS},
        }
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        if (module_name, global_name) not in known:
            raise ModelError(
                f"asks to run {module_name}.{global_name}, which is not the data of a model: "
                "refused, nothing in it has run"
            )
        return known[module_name, global_name]

    def persistent_load(self, pid: Any, /) -> Tensor:
        """The storage ("storage", dtype, key, device, elements) as a flat tensor."""
        _, dtype, key, _, elements = cast(tuple[str, torch.dtype, str, str, int], pid)
        if key not in self._storages:
            entry = self._archive.getinfo(f"{self._root}data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED:  # torch never does: a zip bomb
                raise ModelError(f"its entry {entry.filename} is compressed")
            data = bytearray(self._archive.read(entry))
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if flat.numel() != elements:
                raise ModelError(f"{entry.filename} holds {flat.numel()} numbers, not {elements}")
            self._storages[key] = flat
        return self._storages[key]

    def _tensor(
        self, storage: Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        return storage.as_strided(shape, stride, offset)

    def _parameter(self, tensor: Tensor, *_: Any) -> Tensor:
        return tensor

    def _untyped(self, value: Any, _: str) -> Any:
        return value


_LISTS = ("int", "double", "bool", "tensor")


def _tensors(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(module, _Attributes) or not isinstance(module.values, dict):
        raise ModelError("its data.pkl is not a module")
    if depth > _DEEPEST:
        raise ModelError(f"more than {_DEEPEST} modules within one another")
    for name, value in cast(dict[str, Any], module.values).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Attributes) and isinstance(value.values, dict):
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)
