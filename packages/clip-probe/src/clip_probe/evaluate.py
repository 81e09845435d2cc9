"""Class heads on labelled sets: zero-shot heads made on the spot, and heads saved earlier."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from clip_models import Head, LoadedModel, build_head, load_head, read_templates
from torch import Tensor

from clip_probe.calibration import calibrate
from clip_probe.datasets import Split, open_split
from clip_probe.details import write_details
from clip_probe.errors import ProbeError
from clip_probe.extract import Feature
from clip_probe.features import Encoded, EncodeOptions, encode
from clip_probe.metrics import score, score_multilabel
from clip_probe.predictions import predict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Details:
    """Whether and where files about each head on each set are written."""

    output: Path | None = None  # gets a folder for each set, or SET/HEAD
    save_predictions: bool = False


def zeroshot(
    model: LoadedModel,
    sets: Sequence[Path],
    split: str = "test",
    *,
    templates: str | None = None,
    classnames: str | None = None,
    details: Details = Details(),
    **options: Unpack[EncodeOptions],
) -> Iterator[dict[str, Any]]:
    """Zero-shot scores on each set, with its own class names and templates unless others are given.

    Args:
        model: the model.
        sets: as in `open_split`; multi-label sets too.
        split: of every set.
        templates, classnames: a file, a directory or a known name, as in `clip_models`.
        details: files to write.
        options: as in `encode`.

    Raises:
        ProbeError: as `open_split` and `encode`; all sets are opened before the first is encoded.
        ModelError: class names or templates are missing, or a template has no {c}.
    """
    opened = _open(sets, split, details, classnames)
    heads = [zeroshot_head(model, data, templates) for data in opened]
    for data, head in zip(opened, heads, strict=True):
        encoded = encode(model, data, **options)
        about = {**about_data("zeroshot", model, data, options), **about_head(head)}
        folder = details.output / data.set_name if details.output else None
        yield evaluate(about, data, encoded, head, folder, details.save_predictions)


def evaluate_heads(
    model: LoadedModel,
    sets: Sequence[Path],
    heads: Sequence[str],
    split: str = "test",
    *,
    details: Details = Details(),
    **options: Unpack[EncodeOptions],
) -> Iterator[dict[str, Any]]:
    """Scores of each saved head on each set; the images of a set are decoded once for all heads.

    A head's classes are matched to the set's by name, whatever their order; classes that only the
    head has are left out.

    Raises:
        ProbeError: the set has a class that a head has not; as `open_split` and `encode`.
        ModelError: no such head, or a head of another model.
    """
    opened = _open(sets, split, details, None)
    loaded = {name: load_head(model.path, name) for name in heads}
    fitted = {
        (data.path, name): fit_head(head, name, data)
        for data in opened
        for name, head in loaded.items()
    }
    kinds: list[Feature] = sorted({head.feature for head in loaded.values()})
    for data in opened:
        encoded = encode(model, data, kinds, **options)
        for name in loaded:
            head = fitted[data.path, name]
            about = {**about_data("eval", model, data, options), "head": name, **about_head(head)}
            folder = details.output / data.set_name / name if details.output else None
            yield evaluate(about, data, encoded, head, folder, details.save_predictions)


def evaluate(
    about: dict[str, Any],
    data: Split,
    encoded: Encoded,
    head: Head,
    folder: Path | None,
    save_predictions: bool,
) -> dict[str, Any]:
    """`about` and the scores of one head on one encoded split; with `folder` also files in it."""
    features_ND: Tensor = encoded.features[head.feature]
    predictions = predict(head.logits, features_ND, data.multilabel)
    if predictions.logits_NC is None:
        correct_N = predictions.best_NK[:, 0] == encoded.labels
        calibration = calibrate(predictions.confidence_N, correct_N)
        classes = len(data.class_names)
        scores = {
            **asdict(score(predictions.best_NK, predictions.predicted_N, encoded.labels, classes)),
            "ece": calibration.ece,
        }
    else:
        calibration = None
        scores = asdict(score_multilabel(predictions.logits_NC, encoded.labels))
    row = {**about, **scores, "failed": encoded.failed}
    if folder:
        write_details(folder, row, data, encoded, predictions, calibration, save_predictions)
    return row


def zeroshot_head(model: LoadedModel, data: Split, templates: str | None = None) -> Head:
    """The head of a set's class names; classes of one name are allowed, as ImageNet has them."""
    prompts = read_templates(templates or data.path)
    return build_head(model, data.class_names, prompts, allow_duplicates=True)


def templates_hash(templates: Sequence[str]) -> str:
    """What a head that is built from these templates records."""
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()[:16]


def about_data(
    task: str, model: LoadedModel, data: Split, options: EncodeOptions
) -> dict[str, Any]:
    """What was measured: model, set, transform and precision."""
    return {
        "task": task,
        "model": str(model.path),
        "fingerprint": model.fingerprint,
        "dataset": data.source,
        "split": data.name,
        "digest": data.digest,
        "transform": model.preprocess.hash,
        "precision": options.get("precision", "fp32"),
    }


def about_head(head: Head) -> dict[str, Any]:
    """What measured it."""
    return {"kind": head.kind, "feature": head.feature, "templates_hash": head.templates_hash}


def fit_head(head: Head, name: str, data: Split) -> Head:
    """The head with the set's classes, in the set's order.

    Raises:
        ProbeError: a class of the set is not the head's, or some name is given twice and the
            classes differ.
    """
    if head.class_names == data.class_names:
        return head
    if missing := sorted(set(data.class_names) - set(head.class_names)):
        only_head = sorted(set(head.class_names) - set(data.class_names))
        raise ProbeError(
            f"head {name!r} does not fit {data.path}: only the head has the classes "
            f"{_some(only_head)}, only the set has {_some(missing)}; "
            "expected the set's names among the head's, in any order"
        )
    rows = {class_name: row for row, class_name in enumerate(head.class_names)}
    if len(rows) < len(head.class_names) or len(set(data.class_names)) < len(data.class_names):
        raise ProbeError(
            f"head {name!r} and {data.path} give a class name twice and order their classes "
            "differently: they cannot be matched by name; make the names unique"
        )
    if len(rows) > len(data.class_names):
        logger.info(
            "%s: %d of the %d classes of head %r", data.path, len(data.class_names), len(rows), name
        )
    order = [rows[class_name] for class_name in data.class_names]
    return Head(
        head.weight[order],
        head.bias[order],
        data.class_names,
        head.kind,
        head.feature,
        head.fingerprint,
        head.templates_hash,
    )


def _open(
    sets: Sequence[Path], split: str, details: Details, classnames: str | None
) -> list[Split]:
    opened = [open_split(path, split, class_names=classnames, multilabel=True) for path in sets]
    if details.save_predictions and not details.output:
        raise ProbeError("predictions are written beside the rest: give --output too")
    names = [data.set_name for data in opened]
    if details.output and (twice := [name for name in names if names.count(name) > 1]):
        raise ProbeError(f"two sets would share {details.output}/{twice[0]}: evaluate them apart")
    return opened


def _some(names: list[str]) -> str:
    return f"{names[:5]} and {len(names) - 5} more" if len(names) > 5 else str(names)
