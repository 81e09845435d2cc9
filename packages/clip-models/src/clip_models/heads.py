"""Class heads: a linear classifier on a model's image features.

Zero-shot, probed and fine-tuned heads are one thing: `logits = l2norm(features) @ weight.T + bias`,
with exp(logit_scale) folded into the weight. A head belongs to one model and says to which.
"""

# N images, C classes, P prompts, D feature width, E embedding

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_models.class_files import read_class_names, read_templates
from clip_models.errors import ModelError
from clip_models.model_dir import LoadedModel, fingerprint_of, load_model

HeadKind = Literal["zero-shot", "probe", "fine-tuned", "interpolated"]
FeatureKind = Literal["post", "pre"]

_PROMPTS_A_BATCH = 1024
_logger = getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """A linear classifier over L2-normalised image features.

    Attributes:
        weight: float32 [C, D].
        bias: float32 [C].
        class_names: C names in order; an empty name is a class like any other.
        kind: how the weights were made.
        feature: "post": the embedding, D = E; "pre": the image tower's width, before projection.
        fingerprint: of the model whose features it reads.
        templates_hash: identifies the prompts of a head made from text, else None.
    """

    weight: Tensor
    bias: Tensor
    class_names: tuple[str, ...]
    kind: HeadKind
    feature: FeatureKind
    fingerprint: str
    templates_hash: str | None = None

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        if self.weight.ndim != 2 or len(self.weight) != classes or self.bias.shape != (classes,):
            raise ModelError(
                f"a head of {classes} classes needs weight [{classes}, D] and bias [{classes}]; "
                f"found {tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            )
        if self.kind not in get_args(HeadKind) or self.feature not in get_args(FeatureKind):
            raise ModelError(f"unknown kind {self.kind!r} or feature {self.feature!r} of a head")

    def logits(self, features_ND: Tensor) -> Tensor:
        """Image features [N, D], of any length -> logits [N, C]."""
        weight, bias = self.weight.to(features_ND), self.bias.to(features_ND)
        return F.linear(F.normalize(features_ND, dim=-1), weight, bias)


@torch.no_grad()
def build_head(loaded: LoadedModel, class_names: Sequence[str], templates: Sequence[str]) -> Head:
    """The zero-shot head: per class the mean of its prompts' embeddings, each and all of length 1.

    As in the paper and CLIP_benchmark (Radford et al., 2103.00020, section 3.1.4).

    Args:
        loaded: the model; the text tower runs on its device.
        class_names: C names.
        templates: P prompts with `{c}` where the name goes.

    Raises:
        ModelError: no classes, no templates, or a template without `{c}`.
    """
    if not class_names or not templates:
        raise ModelError(
            f"{len(class_names)} class names and {len(templates)} templates: "
            "a zero-shot head needs at least one of each"
        )
    for template in templates:
        if "{c}" not in template:
            raise ModelError(f"template {template!r} has no {{c}} where the class name goes")
    # two classes of ImageNet share a name with another: legal, and worth knowing
    if twice := [name for name, count in Counter(class_names).items() if count > 1]:
        _logger.warning("class names given twice, so these classes look the same: %s", twice)
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    tokens = loaded.tokenizer(prompts)
    embeddings_NE = torch.cat(
        [
            loaded.model.encode_text(batch, normalize=True)
            for batch in tokens.split(_PROMPTS_A_BATCH)
        ]
    )
    mean_CE = embeddings_NE.float().view(len(class_names), len(templates), -1).mean(1)
    scale, bias = loaded.model.logit_scale.exp(), loaded.model.logit_bias
    weight_CE = F.normalize(mean_CE, dim=-1) * scale
    return Head(
        weight=weight_CE.cpu(),
        bias=torch.full((len(class_names),), 0.0 if bias is None else float(bias)),
        class_names=tuple(class_names),
        kind="zero-shot",
        feature="post",
        fingerprint=loaded.fingerprint,
        templates_hash=hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16],
    )


def save_head(model_path: str | os.PathLike[str], name: str, head: Head) -> Path:
    """Add a head to a model directory as `heads/NAME.safetensors`, whole or not at all.

    Raises:
        ModelError: the name is taken or no file name, or the head is of another model.
    """
    file = _head_file(model_path, name)
    if file.exists():
        raise ModelError(f"{file} exists, and heads are not overwritten; choose another name")
    _check_fingerprint(head.fingerprint, model_path, f"the head {name!r}")
    metadata = {
        "class_names": json.dumps(head.class_names),
        "kind": head.kind,
        "feature": head.feature,
        "fingerprint": head.fingerprint,
    }
    if head.templates_hash is not None:
        metadata["templates_hash"] = head.templates_hash
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(f".{name}.{os.getpid()}.tmp")
    tensors = {"weight": head.weight.float().contiguous(), "bias": head.bias.float().contiguous()}
    save_file(tensors, temporary, metadata=metadata)
    temporary.rename(file)
    return file


def load_head(model_path: str | os.PathLike[str], name: str) -> Head:
    """Read `heads/NAME.safetensors` of a model directory.

    Raises:
        ModelError: no such head, a damaged file, or a head of another model.
    """
    file = _head_file(model_path, name)
    if not file.is_file():
        there = ", ".join(list_heads(model_path)) or "none"
        raise ModelError(
            f"{model_path} has no head {name!r} (it has: {there}); "
            "make one with `clip-models build-head` or `clip-probe sweep --save-head`"
        )
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = cast(dict[str, str], stored.metadata() or {})
            weight, bias = stored.get_tensor("weight"), stored.get_tensor("bias")
        head = Head(
            weight=weight,
            bias=bias,
            class_names=tuple(json.loads(metadata["class_names"])),
            kind=cast(HeadKind, metadata["kind"]),
            feature=cast(FeatureKind, metadata["feature"]),
            fingerprint=metadata["fingerprint"],
            templates_hash=metadata.get("templates_hash"),
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise ModelError(
            f"{file} is damaged or not a class head ({error}); build it again"
        ) from error
    _check_fingerprint(head.fingerprint, model_path, str(file))
    return head


def add_zero_shot_head(
    model_path: Path, name: str, class_names: Path, templates: Path
) -> dict[str, Any]:
    """Build a zero-shot head from files and add it to a model directory; returns what was added.

    Raises:
        ModelError: as in `build_head` and `save_head`.
    """
    head = build_head(
        load_model(model_path), read_class_names(class_names), read_templates(templates)
    )
    file = save_head(model_path, name, head)
    return {
        "head": str(file),
        "classes": len(head.class_names),
        "templates_hash": head.templates_hash,
        "fingerprint": head.fingerprint,
    }


def list_heads(model_path: str | os.PathLike[str]) -> list[str]:
    """The names of a model directory's heads."""
    return sorted(file.stem for file in (Path(model_path) / "heads").glob("*.safetensors"))


def _head_file(model_path: str | os.PathLike[str], name: str) -> Path:
    if not name or name != Path(name).name or name.startswith("."):
        raise ModelError(f"a head's name becomes a file name; {name!r} cannot")
    return Path(model_path) / "heads" / f"{name}.safetensors"


def _check_fingerprint(found: str, model_path: str | os.PathLike[str], what: str) -> None:
    expected = fingerprint_of(model_path)
    if found != expected:
        raise ModelError(
            f"{what} was made for another model ({found[:15]}…) than {model_path} "
            f"({expected[:15]}…); build it again for this one"
        )
