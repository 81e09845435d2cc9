"""The feature cache: blocks of images that were encoded once, kept for every later task.

    CACHE/KEY/about.json               what the key stands for
    CACHE/KEY/KIND/00000.safetensors   a block of images: which could be decoded, their features

KEY is a hash of all that features depend on: the model's configuration and weights, its image
transform, the precision, and the bytes of the set's shards. Change any and the key is another: what
is stale is never read. Labels are not kept here, so class names may change. A block appears whole
or not at all: an extraction that was killed continues with the blocks that are missing.
"""

# n images of a block, D features

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_probe.errors import ProbeError
from clip_probe.files import write_file, write_text


@dataclass(frozen=True)
class Block:
    """One kind of feature of consecutive images."""

    kept: list[int]  # the images that could be decoded, by their number in the split
    features: Tensor  # [n, D] float32
    failures: list[str]  # why others could not


class FeatureCache:
    """The blocks of one split as one model encodes it."""

    def __init__(self, cache: Path, about: dict[str, Any]) -> None:
        """Args: about: all that the features depend on, as JSON."""
        text = json.dumps(about, sort_keys=True)
        self.folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._about = about

    def has(self, kind: str, number: int) -> bool:
        """Whether a block is there."""
        return self._file(kind, number).is_file()

    def write(self, kind: str, number: int, block: Block) -> None:
        """Add a block; another process may add the same."""
        file, writer = self._file(kind, number), str(os.getpid())
        if not (self.folder / "about.json").is_file():
            text = json.dumps(self._about, indent=1) + "\n"
            write_text(self.folder / "about.json", text, writer)
        tensors = {"kept": torch.tensor(block.kept), "features": block.features}
        metadata = {"failures": json.dumps(block.failures)}
        write_file(file, lambda to: save_file(tensors, to, metadata=metadata), writer)

    def read(self, kind: str, number: int) -> Block:
        """Raises: ProbeError: the file is damaged."""
        file = self._file(kind, number)
        try:
            with safe_open(file, framework="pt") as stored:
                failures: list[str] = json.loads(stored.metadata()["failures"])
                features: Tensor = stored.get_tensor("features")
                return Block(stored.get_tensor("kept").tolist(), features, failures)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ProbeError(
                f"{file} is damaged ({error}): remove it, and its images are encoded again"
            ) from error

    def _file(self, kind: str, block: int) -> Path:
        return self.folder / kind / f"{block:05d}.safetensors"
