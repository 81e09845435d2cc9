"""What a head says of each image, and the Parquet files that keep it.

One label an image: key, label, predicted, confidence, best (the five best classes in order), and
the names of label and prediction. Multi-label: key, labels, scores (a logit for each class).
"""

# N samples, D features, C classes, K best classes kept

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_probe.datasets import Split
from clip_probe.errors import ProbeError
from clip_probe.features import Encoded
from clip_probe.files import write_file

ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Predictions:
    """The best classes of each image, or, of a multi-label set, all logits."""

    best_NK: Tensor  # int64, best first, five or all if fewer
    predicted_N: Tensor  # the argmax; where classes share a name and so a logit, `best` may differ
    confidence_N: Tensor  # softmax probability of the best
    logits_NC: Tensor | None  # kept for multi-label sets alone


def predict(
    logits: Callable[[Tensor], Tensor], features_ND: Tensor, multilabel: bool = False
) -> Predictions:
    """Apply a head to features; `logits` maps [n, D] to [n, C], and is called on blocks of rows."""
    best: list[Tensor] = []
    predicted: list[Tensor] = []
    confidence: list[Tensor] = []
    kept: list[Tensor] = []
    for rows in features_ND.split(ROWS_AT_ONCE):
        logits_nC = logits(rows)
        best.append(logits_nC.topk(min(5, logits_nC.shape[1])).indices)
        predicted.append(logits_nC.argmax(1))
        confidence.append(logits_nC.softmax(1).amax(1))
        kept += [logits_nC] if multilabel else []
    blocks = (torch.cat(best), torch.cat(predicted), torch.cat(confidence))
    return Predictions(*blocks, torch.cat(kept) if kept else None)


def write_predictions(path: Path, split: Split, encoded: Encoded, predictions: Predictions) -> None:
    """Write a Parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = [split.samples[number] for number in encoded.kept]
    columns: dict[str, Any] = {"key": [sample.key for sample in samples]}
    if predictions.logits_NC is not None:
        columns["labels"] = pa.array([s.labels for s in samples], pa.list_(pa.int32()))
        columns["scores"] = list(predictions.logits_NC.numpy())
    else:
        names = pa.array(split.class_names)
        labels, predicted = encoded.labels.numpy(), predictions.predicted_N.numpy()
        columns["label"] = pa.array(labels, pa.int32())
        columns["predicted"] = pa.array(predicted, pa.int32())
        columns["confidence"] = predictions.confidence_N.numpy()
        columns["best"] = pa.array(list(predictions.best_NK.numpy()), pa.list_(pa.int32()))
        columns["label_name"] = names.take(pa.array(labels))
        columns["predicted_name"] = names.take(pa.array(predicted))
    table = pa.table(columns)
    write_file(path, lambda to: pq.write_table(table, to, compression="zstd"))


def read_predictions(path: Path) -> dict[str, Any]:
    """The columns of a file as NumPy arrays; labels of a multi-label set as lists.

    Raises:
        ProbeError: missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ProbeError(f"{path}: no predictions can be read ({error}); run again") from error
    return dict(zip(table.column_names, (c.to_numpy() for c in table.columns), strict=True))
