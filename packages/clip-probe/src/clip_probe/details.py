"""A folder about one head on one set: result, class by class, confusions, reliability.

result.json         the line that is printed
per_class.csv       recall, precision and the commonest confusion of each class
confusion.csv/.png  how often each class (row) was named as each other (column)
reliability.png     accuracy against confidence
predictions.parquet on request
"""

# C classes

import csv
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_probe.calibration import Calibration
from clip_probe.datasets import Split
from clip_probe.features import Encoded
from clip_probe.files import write_file, write_text
from clip_probe.metrics import average_precisions, wilson_interval
from clip_probe.predictions import Predictions, write_predictions
from clip_probe.set_plots import plot_confusion, plot_reliability


def write_details(
    folder: Path,
    row: dict[str, Any],
    split: Split,
    encoded: Encoded,
    predictions: Predictions,
    calibration: Calibration | None,
    save_predictions: bool,
) -> None:
    """Write the files; each whole or not at all, the result last."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{split.set_name}, {split.name}"
    if calibration is None:
        table = _average_precision_table(split, encoded.labels, predictions)
        write_text(folder / "per_class.csv", _csv(table))
    else:
        confusion_CC = confusion(encoded.labels, predictions.predicted_N, len(split.class_names))
        write_text(folder / "per_class.csv", _csv(_recall_table(split, confusion_CC)))
        header = ["label", *split.class_names]
        lines = zip(split.class_names, confusion_CC.tolist(), strict=True)
        write_text(
            folder / "confusion.csv", _csv([header, *([name, *line] for name, line in lines)])
        )
        picture = folder / "confusion.png"
        write_file(picture, lambda to: plot_confusion(confusion_CC, split.class_names, title, to))
        picture = folder / "reliability.png"
        write_file(picture, lambda to: plot_reliability(calibration, title, to))
    if save_predictions:
        write_predictions(folder / "predictions.parquet", split, encoded, predictions)
    write_text(folder / "result.json", json.dumps(row, indent=1) + "\n")


def confusion(labels_N: Tensor, predicted_N: Tensor, classes: int) -> Tensor:
    """How many samples of each class (row) were called each class (column): int64 [C, C]."""
    pairs_N = labels_N * classes + predicted_N
    return pairs_N.bincount(minlength=classes * classes).view(classes, classes)


def _recall_table(split: Split, confusion_CC: Tensor) -> list[list[Any]]:
    header = ("class", "samples", "recall", "recall_low", "recall_high", "precision")
    table: list[list[Any]] = [[*header, "confused_with", "confused"]]
    named_C = confusion_CC.sum(0).tolist()
    wrong_CC = confusion_CC - torch.diag(confusion_CC.diagonal())
    for label, name in enumerate(split.class_names):
        samples, right = int(confusion_CC[label].sum()), int(confusion_CC[label, label])
        other = int(wrong_CC[label].argmax())
        times = int(wrong_CC[label, other])
        table.append(
            [
                name,
                samples,
                *((right / samples, *wilson_interval(right, samples)) if samples else ("", "", "")),
                right / named_C[label] if named_C[label] else "",
                split.class_names[other] if times else "",
                times,
            ]
        )
    return table


def _average_precision_table(
    split: Split, labels_NC: Tensor, predictions: Predictions
) -> list[list[Any]]:
    logits_NC = predictions.logits_NC
    precisions = average_precisions(logits_NC, labels_NC) if logits_NC is not None else Tensor()
    rows = zip(split.class_names, labels_NC.sum(0).tolist(), precisions.tolist(), strict=True)
    return [["class", "positives", "average_precision"], *(list(row) for row in rows)]


def _csv(rows: list[list[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
