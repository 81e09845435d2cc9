"""The sweep of a labelled set: encode once, probe at every number of shots, test, write down."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import numpy as np
import torch
import torch.nn.functional as F
from clip_models import Head, LoadedModel, list_heads, read_templates, save_head
from torch import Tensor
from tqdm import tqdm

from clip_probe.datasets import Split, open_split
from clip_probe.draws import Rows, Task, few_shot_draw, few_shot_task, full_task
from clip_probe.errors import ProbeError
from clip_probe.evaluate import templates_hash, zeroshot_head
from clip_probe.extract import Feature
from clip_probe.features import EncodeOptions, encode
from clip_probe.metrics import Scores, score
from clip_probe.predictions import predict, write_predictions
from clip_probe.probes import Method, Probe, Solver, find_probes, method_of
from clip_probe.solver import TOLERANCE
from clip_probe.sweep_files import SweepFiles

Start = Literal["random", "zero-shot"]
SHOTS = (1, 2, 4, 8, 16)
PAPER = "the paper's (2212.07143, section 4.3): Adam, batch 256, the best of the grid on TEST"
BY_VAL = "accuracy on the val split; the full probe is refitted on train and val"
WITHOUT_VAL = (
    "full: accuracy on a stratified fifth of train, then refitted on all of train; few-shot: "
    "cross-validation within the draw, for one shot the fixed setting that is reported"
)

logger = logging.getLogger(__name__)


def sweep(
    model: LoadedModel,
    dataset: Path,
    *,
    train_split: str = "train",
    val_split: str | None = None,
    test_split: str = "test",
    shots: Sequence[int] = SHOTS,
    feature: Feature = "post",
    seeds: int = 3,
    solver: Solver = "lbfgs",
    tolerance: float = TOLERANCE,
    start: Start = "random",
    paper: bool = False,
    templates: str | None = None,
    classnames: str | None = None,
    head_name: str | None = None,
    output: Path | None = None,
    **options: Unpack[EncodeOptions],
) -> dict[str, Any]:
    """Fit and test linear probes; return the results, and write them to `output` if given.

    `output` receives what `SweepFiles` lists; where it holds this very sweep already, that is
    returned, and where it holds its beginning, it continues. `head_name` saves the full-data probe
    in the model directory. `paper` is the paper's protocol: its grid with the adam solver, and
    the best setting chosen on the test split. `templates` (of the zero-shot head) and `classnames`
    replace the set's own, as in `zeroshot`.

    Raises:
        ProbeError: as `check_options`; a class with fewer images than shots, the head cannot be
            saved, `output` holds another sweep; as `open_split`, `encode` and `full_task`.
        ModelError: class names are missing, or a template has no {c}.
    """
    solver = "adam" if paper else solver
    check_options(shots, feature, seeds, solver, tolerance, start, paper, val_split, head_name)
    names = {"train": train_split, "val": val_split, "test": test_split}
    splits = {
        role: open_split(dataset, name, class_names=classnames)
        for role, name in names.items()
        if name
    }
    train, test, classes = splits["train"], splits["test"], len(splits["train"].class_names)
    check_shots(train, torch.tensor(train.labels), shots)
    method = method_of(solver, tolerance=tolerance, paper=paper)
    towers = json.dumps(model.config.to_dict(), sort_keys=True)
    prompted = templates or (test.path / "zeroshot_classification_templates.txt").is_file()
    prompts = read_templates(templates or test.path) if prompted else None
    settings: dict[str, Any] = {
        "fingerprint": model.fingerprint,
        "model_config": hashlib.sha256(towers.encode()).hexdigest()[:16],
        "preprocess": model.preprocess.hash,
        "templates_hash": templates_hash(prompts) if prompts else None,
        "splits": names,
        "digests": {role: split.digest for role, split in splits.items()},
        "feature": feature,
        "precision": options.get("precision", "fp32"),
        "shots": list(shots),
        "seeds": seeds,
        "solver": solver,
        "tolerance": tolerance if solver == "lbfgs" else None,
        "start": start,
        "grid": [method.describe(setting) for setting in method.settings],
        "choice": PAPER if paper else BY_VAL if val_split else WITHOUT_VAL,
    }
    files = SweepFiles(output, settings) if output else None
    earlier = files.finished() if files else None
    saved = head_name in list_heads(model.path)
    if earlier and (head_name is None or (saved and earlier["head"] == head_name)):
        logger.info("nothing left to do: %s holds this sweep", output)
        return earlier
    if saved:
        raise ProbeError(
            f"{model.path} has a head {head_name!r} already: give --save-head another name"
        )

    # what probes are compared with
    zero_shot = zeroshot_head(model, test, templates) if prompts else None
    if start == "zero-shot":
        if zero_shot is None:
            raise ProbeError(f"--start zero-shot: {test.path} has no templates to make a head of")
        method = method_of(solver, paper=paper, start=(zero_shot.weight, zero_shot.bias))
    encoded = {
        role: encode(
            model,
            split,
            ("post", feature) if role == "test" and zero_shot and feature != "post" else (feature,),
            **options,
        )
        for role, split in splits.items()
    }
    rows = {role: Rows(F.normalize(e.features[feature]), e.labels) for role, e in encoded.items()}
    check_shots(train, rows["train"].labels, shots)  # again: some images may be corrupt
    absent = _absent_classes(splits, rows)

    def tested(logits: Callable[[Tensor], Tensor], kind: Feature = feature) -> Scores:
        said = predict(logits, encoded["test"].features[kind])
        return score(said.best_NK, said.predicted_N, encoded["test"].labels, classes)

    def choice(probe: Probe) -> dict[str, Any]:
        return _choice(probe, method, "test_acc1" if paper else "val_acc1")

    device = model.model.logit_scale.device
    few_shot = files.rows() if files else []
    bar = tqdm([*shots, 0][len(few_shot) :], desc="probes", unit="point", disable=None)
    for k in bar:
        if k == 0:
            break  # the full data, below
        tasks = [_task(rows, k, seed, paper) for seed in range(seeds)]
        probes = find_probes(tasks, classes, method, device)
        accuracies = [tested(probe.logits).acc1 for probe in probes]
        few_shot.append(
            {
                "shots": k,
                "acc1_mean": float(np.mean(accuracies)),
                "acc1_std": float(np.std(accuracies, ddof=1)) if seeds > 1 else None,
                "draws": [
                    {"seed": seed, "acc1": acc1, **choice(probe)}
                    for seed, (probe, acc1) in enumerate(zip(probes, accuracies, strict=True))
                ],
            }
        )
        if files:
            files.keep(few_shot)
    (full,) = find_probes([_task(rows, None, 0, paper)], classes, method, device)
    bar.close()
    scores = tested(full.logits)
    result = {
        "task": "sweep",
        "model": str(model.path),
        "dataset": str(dataset),
        **settings,
        "samples": {role: len(e.labels) for role, e in encoded.items()},
        "failed": {role: e.failed for role, e in encoded.items()},
        "classes": classes,
        "classes_absent": absent,
        "majority_class_share": scores.majority_class_share,
        "zero_shot": asdict(tested(zero_shot.logits, "post")) if zero_shot else None,
        "few_shot": few_shot,
        "full": {**asdict(scores), **choice(full)},
        "head": head_name,
    }
    if files:
        said = predict(full.logits, encoded["test"].features[feature])
        write_predictions(files.predictions, test, encoded["test"], said)
        files.finish(result)
    if head_name and feature != "pixels":  # last, so that a sweep killed before is run again
        head = Head(full.weight, full.bias, train.class_names, "probe", feature, model.fingerprint)
        save_head(model.path, head_name, head)
    return result


def _task(rows: dict[str, Rows], shots: int | None, seed: int, paper: bool) -> Task:
    train, val = rows["train"], rows.get("val")
    if paper:
        draw = train.pick(few_shot_draw(train.labels, shots, seed).flatten()) if shots else train
        return Task([(draw, rows["test"])], draw)
    return few_shot_task(train, val, shots, seed) if shots else full_task(train, val)


def _choice(probe: Probe, method: Method, judged_by: str) -> dict[str, Any]:
    """How the setting was chosen. At an end of a grid of C a better C may lie beyond it."""
    c, ends = probe.setting, (method.settings[0], method.settings[-1])
    of_c = {"c_at_grid_end": c in ends, "c_not_converged": probe.unfinished}
    return {
        "train_samples": probe.train_samples,
        **method.describe(probe.setting),
        **(of_c if isinstance(c, float) else {}),
        judged_by: probe.judged,
    }


def _absent_classes(splits: dict[str, Split], rows: dict[str, Rows]) -> dict[str, list[str]]:
    """Classes without a usable image, for each split that lacks any.

    Absent from train, a class is never predicted; from val or test, it judges nothing.
    """
    found: dict[str, list[str]] = {}
    for role, split in splits.items():
        present = set(rows[role].labels.tolist())
        lacking = [name for label, name in enumerate(split.class_names) if label not in present]
        if lacking:
            found[role] = lacking
            logger.warning("%d classes have no image in split %r", len(lacking), split.name)
    return found


def check_options(
    shots: Any = SHOTS,
    feature: str = "post",
    seeds: Any = 1,
    solver: str = "lbfgs",
    tolerance: Any = TOLERANCE,
    start: str = "random",
    paper: bool = False,
    val_split: str | None = None,
    head_name: str | None = None,
    **_: Any,
) -> None:
    """Check options of `sweep`, which a suite takes from a file.

    Raises:
        ProbeError: a value that an option does not take, or options that contradict each other.
    """
    for name, value, known in (
        ("solver", solver, get_args(Solver)),
        ("feature", feature, get_args(Feature)),
        ("start", start, get_args(Start)),
        ("paper", paper, (True, False)),
    ):
        if value not in known:
            raise ProbeError(f"{name} {value!r} is none of {', '.join(map(str, known))}")
    if not isinstance(shots, Sequence) or not all(map(_is_count, shots)):
        raise ProbeError(f"shots {shots!r}: expected a list of whole numbers from 1 on")
    if not _is_count(seeds):
        raise ProbeError(f"seeds {seeds!r}: expected a whole number from 1 on")
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        raise ProbeError(f"tolerance {tolerance!r}: expected a number between 0 and 1")
    if tolerance != TOLERANCE and (solver != "lbfgs" or paper):
        raise ProbeError("--tolerance is that of --solver lbfgs")
    if paper and val_split:
        raise ProbeError("--paper chooses on the test split: leave --val-split out")
    if start == "zero-shot" and ((solver != "adam" and not paper) or feature != "post"):
        raise ProbeError(
            "--start zero-shot takes --solver adam or --paper, and post features: the optimum of "
            "the other solvers depends on no start, and zero-shot heads read embeddings"
        )
    if head_name and feature == "pixels":
        raise ProbeError("a probe on pixels is no head of a model: leave --save-head out")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def check_shots(train: Split, labels_N: Tensor, shots: Sequence[int]) -> None:
    """Raises: ProbeError: a class that is there has fewer images than shots."""
    counts = labels_N.bincount()
    counts[counts == 0] = counts.max()  # an absent class is reported, not drawn from
    label, fewest = int(counts.argmin()), int(counts.min())
    if too_many := [k for k in shots if k > fewest]:
        enough = ",".join(str(k) for k in shots if k <= fewest)
        raise ProbeError(
            f"class {train.class_names[label]!r} has {fewest} usable images in split "
            f"{train.name!r} of {train.path}, fewer than {too_many[0]} shots: "
            f"use --shots '{enough}'"
        )
