"""Class heads on labelled sets: zero-shot heads made on the spot, and heads saved earlier."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from clip_models import Head, LoadedModel, build_head, load_head, read_templates
from torch import Tensor

from clip_probe.datasets import Split, open_split
from clip_probe.errors import ProbeError
from clip_probe.extract import Feature
from clip_probe.features import EncodeOptions, encode
from clip_probe.metrics import best_classes, score


def zeroshot(
    model: LoadedModel,
    sets: Sequence[Path],
    split: str = "test",
    *,
    templates: Path | None = None,
    **options: Unpack[EncodeOptions],
) -> Iterator[dict[str, Any]]:
    """Zero-shot accuracy on each set, with the set's class names and `templates` (else its own).

    Raises:
        ProbeError: as `open_split` and `encode`; all sets are opened before the first is encoded.
        ModelError: class names or templates are missing, or a template has no {c}.
    """
    opened = [open_split(path, split) for path in sets]
    heads = [
        build_head(
            model,
            data.class_names,
            read_templates(templates or data.path),
            allow_duplicates=True,
        )
        for data in opened
    ]
    for data, head in zip(opened, heads, strict=True):
        encoded = encode(model, data, **options)
        best = best_classes(head.logits, encoded.features["post"])
        scores = score(best, encoded.labels, len(data.class_names))
        yield {
            **_where("zeroshot", model, data),
            **asdict(scores),
            "failed": encoded.failed,
            "templates_hash": head.templates_hash,
        }


def evaluate_heads(
    model: LoadedModel,
    sets: Sequence[Path],
    heads: Sequence[str],
    split: str = "test",
    **options: Unpack[EncodeOptions],
) -> Iterator[dict[str, Any]]:
    """Accuracy of each saved head on each set; the images of a set are decoded once for all heads.

    A head's classes are matched to the set's by name, whatever their order.

    Raises:
        ProbeError: a head's class names are not the set's; as `open_split` and `encode`.
        ModelError: no such head, or a head of another model.
    """
    opened = [open_split(path, split) for path in sets]
    loaded = {name: load_head(model.path, name) for name in heads}
    orders = {
        (data.path, name): class_order(head, name, data)
        for data in opened
        for name, head in loaded.items()
    }
    kinds: list[Feature] = sorted({head.feature for head in loaded.values()})
    for data in opened:
        encoded = encode(model, data, kinds, **options)
        for name, head in loaded.items():
            order = orders[data.path, name]

            def logits(rows: Tensor, head: Head = head, order: list[int] = order) -> Tensor:
                return head.logits(rows)[:, order]

            best = best_classes(logits, encoded.features[head.feature])
            scores = score(best, encoded.labels, len(data.class_names))
            yield {
                **_where("eval", model, data),
                "head": name,
                "kind": head.kind,
                "feature": head.feature,
                **asdict(scores),
                "failed": encoded.failed,
                "templates_hash": head.templates_hash,
            }


def class_order(head: Head, name: str, data: Split) -> list[int]:
    """For each class of the set, the row of the head that stands for it.

    Raises:
        ProbeError: the names differ, or some name is given twice and the orders differ.
    """
    if head.class_names == data.class_names:
        return list(range(len(data.class_names)))
    only_head = sorted(set(head.class_names) - set(data.class_names))
    only_set = sorted(set(data.class_names) - set(head.class_names))
    if only_head or only_set:
        raise ProbeError(
            f"head {name!r} does not fit {data.path}: only the head has the classes "
            f"{_some(only_head)}, only the set has {_some(only_set)}; "
            "expected the same names in any order"
        )
    rows = {class_name: row for row, class_name in enumerate(head.class_names)}
    if not len(rows) == len(head.class_names) == len(data.class_names):
        raise ProbeError(
            f"head {name!r} and {data.path} give a class name twice and order their classes "
            "differently: they cannot be matched by name; make the names unique"
        )
    return [rows[class_name] for class_name in data.class_names]


def _some(names: list[str]) -> str:
    return f"{names[:5]} and {len(names) - 5} more" if len(names) > 5 else str(names)


def _where(task: str, model: LoadedModel, data: Split) -> dict[str, Any]:
    return {
        "task": task,
        "model": str(model.path),
        "fingerprint": model.fingerprint,
        "dataset": str(data.path),
        "split": data.name,
    }
