"""A suite: models times sets, zero-shot and probes, into one results file that resumes.

    OUT/results.jsonl          a line for each model, set and task, in the order of the TOML file
    OUT/report.md, .html       what they say
    OUT/details/MODEL/SET/     tables, plots and predictions of zero-shot heads
    OUT/probes/MODEL/SET/      what `sweep` writes
    OUT/features/              the feature cache

A line says all it depends on. Run again, the suite does what has no line, or whose line depends on
something that has changed; the file comes out the same however often the work was interrupted.
"""

import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from clip_models import LoadedModel, fingerprint_of, profile, read_model_config, read_templates

from clip_probe.datasets import Split, open_split
from clip_probe.errors import ProbeError
from clip_probe.evaluate import (
    about_data,
    about_head,
    evaluate,
    templates_hash,
    zeroshot_head,
)
from clip_probe.extract import Feature
from clip_probe.features import EncodeOptions, encode
from clip_probe.files import write_text
from clip_probe.results import read_results
from clip_probe.suite_config import SetConfig, SuiteConfig, read_suite
from clip_probe.suite_report import write_report
from clip_probe.sweeps import SHOTS, check_options, check_shots, sweep

Row = dict[str, Any]
FOLDERS = {"zeroshot": "details", "probe": "probes"}
RETRIEVAL_KEYS = {"fingerprint", "model", "dataset", "images", "captions", "metrics"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Set:
    config: SetConfig
    split: Split
    templates_hash: str
    probe_digests: dict[str, str]  # of the probe's training and validation splits


def suite(
    file: Path, output: Path, load: Callable[[Path], LoadedModel], **options: Unpack[EncodeOptions]
) -> dict[str, Any]:
    """Run what is missing of a suite and write its report; returns where everything is.

    Args:
        file: the TOML file, as in `suite_config`.
        output: the folder described above.
        load: a model directory to a model on its device.
        options: as in `encode`; the cache is OUT/features unless another is given.

    Raises:
        ProbeError: a fault in the file, or in a set: all sets are opened before anything runs.
        ModelError: a fault in a model, class names or templates.
    """
    config = read_suite(file, list(inspect.signature(sweep).parameters))
    options["cache"] = options.get("cache") or output / "features"
    sets = [_open(one) for one in config.sets]
    plan = dict(_plan(config, sets, options))
    retrieval = _retrieval_rows(config)
    results = output / "results.jsonl"
    earlier = read_results(results) if results.is_file() else []
    found = {(row["name"], row["set"], row["task"]): row for row in earlier}
    rows = {
        key: found[key]
        for key, wanted in plan.items()
        if key in found and found[key].get("depends_on") == wanted
    }
    new = len(plan) - len(rows)
    for name, path in config.models.items():
        if all(key in rows for key in plan if key[0] == name):
            continue
        model = load(path)
        for one in sets:
            todo = {
                task: output / folder / folder_of(name) / folder_of(one.config.name)
                for task, folder in FOLDERS.items()
                if (key := (name, one.config.name, task)) in plan and key not in rows
            }
            if "probe" in todo:
                _begin_probe(todo["probe"], plan[name, one.config.name, "probe"])
            for row in _run(model, one, todo, options):
                key = (name, one.config.name, row["task"])
                rows[key] = {"name": name, "set": one.config.name, **row, "depends_on": plan[key]}
                _write_results(results, [rows[key] for key in plan if key in rows])
    if not new:
        logger.info("nothing left to do: %s is complete", results)
    ordered = [rows[key] for key in plan] + retrieval
    _write_results(results, ordered)
    report = write_report(config, ordered, output)
    return {"results": str(results), "lines": len(ordered), "new": new, **report}


def _open(one: SetConfig) -> _Set:
    split = open_split(
        one.path, one.split, class_names=one.classnames, multilabel=one.probe is None
    )
    templates = read_templates(one.templates or split.path)
    digests: dict[str, str] = {}
    if one.probe is not None:
        check_options(**one.probe)
        for key, default in (("train_split", "train"), ("val_split", None)):
            if name := one.probe.get(key, default):
                data = open_split(one.path, name, class_names=one.classnames)
                digests[name] = data.digest
                if key == "train_split":
                    check_shots(data, torch.tensor(data.labels), one.probe.get("shots", SHOTS))
    return _Set(one, split, templates_hash(templates), digests)


def _plan(
    config: SuiteConfig, sets: Sequence[_Set], options: EncodeOptions
) -> Iterator[tuple[tuple[str, str, str], Row]]:
    """(model, set, task) of every line, and what it depends on."""
    for name, path in config.models.items():
        text = json.dumps(read_model_config(path)[1], sort_keys=True)
        model = {
            "fingerprint": fingerprint_of(path),
            "model_config": hashlib.sha256(text.encode()).hexdigest()[:16],
            "precision": options.get("precision", "fp32"),
        }
        for one in sets:
            data = {**model, "digest": one.split.digest, "templates_hash": one.templates_hash}
            key = (name, one.config.name)
            yield (*key, "zeroshot"), data
            if one.config.probe is not None:
                probe = {"options": one.config.probe, "splits": one.probe_digests}
                yield (*key, "probe"), {**data, **probe}


def _begin_probe(folder: Path, wanted: Row) -> None:
    """Clear the folder of a probe that depended on something else; `sweep` continues its own."""
    file = folder / "depends_on.json"
    text = json.dumps(wanted, indent=1) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        write_text(file, text)


def _run(
    model: LoadedModel, one: _Set, todo: dict[str, Path], options: EncodeOptions
) -> Iterator[Row]:
    """The lines of one model and set. The test images are decoded once, for both tasks.

    Args: todo: the folder of each task.
    """
    if not todo:
        return
    probe = one.config.probe or {}
    feature: Feature = probe.get("feature", "post")
    kinds: list[Feature] = ["post", "pre"] if "probe" in todo and feature == "pre" else ["post"]
    encoded = encode(model, one.split, kinds, **options)
    figures = {
        **{key: profile(model.config)[key] for key in ("parameters", "gmacs")},
        "samples_seen": model.provenance.get("samples_seen"),
    }
    if "zeroshot" in todo:
        head = zeroshot_head(model, one.split, one.config.templates)
        about = {**figures, **about_data("zeroshot", model, one.split, options), **about_head(head)}
        yield evaluate(about, one.split, encoded, head, todo["zeroshot"], save_predictions=True)
    if "probe" in todo:
        result = sweep(
            model,
            one.config.path,
            test_split=one.config.split,
            templates=one.config.templates,
            classnames=one.config.classnames,
            output=todo["probe"],
            **probe,
            **options,
        )
        yield {
            **figures,
            **about_data("probe", model, one.split, options),
            **result,
            "task": "probe",
        }


def _retrieval_rows(config: SuiteConfig) -> list[Row]:
    """Lines of `clip-retrieval eval` about the suite's models, known by their fingerprints."""
    names = {fingerprint_of(path): name for name, path in config.models.items()}
    rows: dict[tuple[str, str], Row] = {}
    for file in config.retrieval:
        lines = [row for row in read_results(file) if row.get("task") == "zeroshot_retrieval"]
        if not lines or not all(line.keys() >= RETRIEVAL_KEYS for line in lines):
            raise ProbeError(f"{file}: expected lines of `clip-retrieval eval`")
        for line in lines:
            if name := names.get(line["fingerprint"]):
                dataset = Path(line["dataset"]).name
                row = {"name": name, "set": dataset, **line, "task": "retrieval"}
                if rows.setdefault((name, dataset), row) != row:
                    raise ProbeError(f"{file}: two results of {name!r} on {dataset!r}; keep one")
            else:
                logger.warning("%s: a line of %s, which the suite has not", file, line["model"])
    order = list(config.models)
    return sorted(rows.values(), key=lambda row: order.index(row["name"]))


def folder_of(name: str) -> str:
    """The folder of a model or set within a task's."""
    return name.replace("/", "-")


def _write_results(file: Path, rows: Sequence[Row]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
