"""Class heads: a linear classifier on a model's image features.

Zero-shot, probed and fine-tuned heads are one thing: `logits = l2norm(features) @ weight.T + bias`,
with exp(logit_scale) folded into the weight. A head belongs to one model and says to which.
"""

# N images, C classes, P prompts, U distinct prompts, D feature width, E embedding

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
from tqdm import tqdm

from clip_models.class_files import (
    CLASS_NAMES_FILE,
    TEMPLATES_FILE,
    read_class_names,
    read_templates,
)
from clip_models.errors import ModelError
from clip_models.model_dir import LoadedModel, fingerprint_of, load_model
from clip_models.templates import DEFAULT_TEMPLATES

HeadKind = Literal["zero-shot", "probe", "fine-tuned", "interpolated"]
FeatureKind = Literal["post", "pre"]

_PROMPTS_AT_ONCE = 4096
_TOKENS_A_BATCH = {"cpu": 2048, "cuda": 1 << 16}  # a core's cache; a GPU's appetite
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
def build_head(
    loaded: LoadedModel,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    allow_duplicates: bool = False,
) -> Head:
    """The zero-shot head: per class the mean of its prompts' embeddings, each and all of length 1.

    As in the paper and CLIP_benchmark (Radford et al., 2103.00020, section 3.1.4).

    Args:
        loaded: the model; the text tower runs on its device.
        class_names: C names.
        templates: prompts with `{c}` where the name goes.
        allow_duplicates: classes of one name, as ImageNet's list has them, get equal weights.

    Raises:
        ModelError: no classes, no templates, a template without `{c}`, a name given twice.
    """
    _check_prompts(class_names, templates, allow_duplicates)
    means: list[Tensor] = []
    step = max(1, _PROMPTS_AT_ONCE // len(templates))
    total = len(class_names) * len(templates)
    with tqdm(total=total, desc="zero-shot head", unit="prompt", disable=None) as progress:
        for start in range(0, len(class_names), step):
            some = class_names[start : start + step]
            prompts = [template.replace("{c}", name) for name in some for template in templates]
            means.append(_embed(loaded, prompts).view(len(some), len(templates), -1).mean(1))
            progress.update(len(prompts))
    scale, bias = loaded.model.logit_scale.exp().cpu(), loaded.model.logit_bias
    return Head(
        weight=F.normalize(torch.cat(means), dim=-1) * scale,
        bias=torch.full((len(class_names),), 0.0 if bias is None else float(bias)),
        class_names=tuple(class_names),
        kind="zero-shot",
        feature="post",
        fingerprint=loaded.fingerprint,
        templates_hash=hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16],
    )


def _check_prompts(
    class_names: Sequence[str], templates: Sequence[str], allow_duplicates: bool
) -> None:
    if not class_names or not templates:
        raise ModelError(
            f"{len(class_names)} class names and {len(templates)} templates: "
            "a zero-shot head needs at least one of each"
        )
    for template in templates:
        if "{c}" not in template or "{}" in template:
            raise ModelError(
                f"template {template!r} {'has {}' if '{}' in template else 'has no {c}'}; "
                "{c}, and only that, marks where the class name goes"
            )
    twice = [name for name, count in Counter(class_names).items() if count > 1]
    if twice and not allow_duplicates:
        raise ModelError(
            f"class names given more than once: {twice[:5]}, {len(twice)} in all; a zero-shot head "
            "cannot tell such classes apart: make the names distinct, or allow it "
            "(--allow-duplicates, allow_duplicates=True)"
        )
    if twice:
        _logger.warning("class names given twice, so these classes look the same: %s", twice)


def _embed(loaded: LoadedModel, prompts: Sequence[str]) -> Tensor:
    """Prompts -> embeddings of length 1, float32 [P, E] on the CPU.

    Equal prompts are computed once, and prompts of about one length together.
    """
    tokens_UL, distinct_P = loaded.tokenizer(prompts).unique(dim=0, return_inverse=True)
    lengths_U, order_U = tokens_UL.count_nonzero(dim=1).sort()
    batch_U = lengths_U.cumsum(0) // _TOKENS_A_BATCH.get(loaded.model.logit_scale.device.type, 8192)
    sizes = batch_U.unique_consecutive(return_counts=True)[1].tolist()
    embeddings_UE = torch.cat(
        [
            loaded.model.encode_text(batch, normalize=True).float().cpu()
            for batch in tokens_UL[order_U].split(sizes)
        ]
    )
    return embeddings_UE[order_U.argsort()[distinct_P]]


def save_head(model_path: str | os.PathLike[str], name: str, head: Head) -> Path:
    """Add a head to a model directory as `heads/NAME.safetensors`, whole or not at all.

    Raises:
        ModelError: the name is taken or no file name, or the head is of another model.
    """
    file = _free_head_file(model_path, name)
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
    model_path: Path,
    name: str,
    *,
    dataset: Path | None = None,
    classnames: str | None = None,
    templates: str | None = None,
    allow_duplicates: bool = False,
) -> dict[str, Any]:
    """Build a zero-shot head and add it to a model directory; returns what was added.

    Args:
        model_path: the model directory.
        name: of the head.
        dataset: a directory in CLIP_benchmark's layout, for what is not given below.
        classnames: as in `read_class_names`.
        templates: as in `read_templates`; `general` where the data set has none.
        allow_duplicates: as in `build_head`.

    Raises:
        ModelError: as in `build_head` and `save_head`.
    """
    loaded = load_model(model_path)
    _free_head_file(model_path, name)  # before the work, not after it
    if dataset is not None:
        classnames = classnames or str(dataset / CLASS_NAMES_FILE)
        if templates is None and (dataset / TEMPLATES_FILE).exists():
            templates = str(dataset / TEMPLATES_FILE)
    if classnames is None:
        raise ModelError("a zero-shot head needs class names, or a data set that has them")
    prompts = read_templates(templates or DEFAULT_TEMPLATES)
    names = read_class_names(classnames)
    head = build_head(loaded, names, prompts, allow_duplicates=allow_duplicates)
    file = save_head(model_path, name, head)
    return {
        "head": str(file),
        "classes": len(names),
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


def _free_head_file(model_path: str | os.PathLike[str], name: str) -> Path:
    file = _head_file(model_path, name)
    if file.exists():
        raise ModelError(f"{file} exists, and heads are not overwritten; choose another name")
    return file


def _check_fingerprint(found: str, model_path: str | os.PathLike[str], what: str) -> None:
    expected = fingerprint_of(model_path)
    if found != expected:
        raise ModelError(
            f"{what} was made for another model ({found[:15]}…) than {model_path} "
            f"({expected[:15]}…); build it again for this one"
        )
