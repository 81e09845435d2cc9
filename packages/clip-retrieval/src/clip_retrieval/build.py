"""Shards and a model directory -> an index directory.

It is made in INDEX.partial/ and renamed as a whole: a reader never sees half an index. A build
that is killed leaves INDEX.partial/parts/, one file per shard done, and continues from there.
"""

# N rows, D embedding width

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_models import LoadedModel, load_model

from clip_retrieval import index as faiss_index
from clip_retrieval.embed import check_failures, embed_images, embed_texts, pick_device
from clip_retrieval.errors import RetrievalError
from clip_retrieval.layout import read_facts, write_facts
from clip_retrieval.metadata import Metadata, merge_parts, part_counts, write_part
from clip_retrieval.plan import Plan, plan_index, size
from clip_retrieval.shards import list_shards, read_samples
from clip_retrieval.vectors import Float16, Int64, open_vectors, unit_rows

log = logging.getLogger(__name__)

_HELD_OUT = 1_000  # queries of each kind, at most a tenth of the pictures


def build_index(
    model: Path,
    shards: Path,
    index: Path,
    *,
    target_recall: float = 0.95,
    max_memory: int = 4 << 30,
    batch_size: int = 128,
    workers: int = 2,
    device: str = "auto",
) -> dict[str, Any]:
    """Build `index`, or continue a build that was interrupted.

    Args:
        target_recall: of the ten nearest, the share the search must find.
        max_memory: bytes the index may take, at its peak, while it is built.

    Returns:
        "index" (its path), "status" ("built", or "nothing left to do" where it is there already)
        and what index.json says of the result.

    Raises:
        RetrievalError: no usable pictures, other inputs than those of what is there, no memory.
    """
    where = pick_device(device)
    tars = list_shards(shards)
    loaded = load_model(model, where)
    inputs = _inputs(loaded, shards, tars)
    settings = {"target_recall": target_recall, "max_memory": max_memory}
    partial = index.parent / f"{index.name}.partial"
    if index.exists():
        if not (index / "index.json").is_file():
            raise RetrievalError(f"{index} exists and is no index; give another path")
        facts = read_facts(index)
        _refuse_other(index, facts["inputs"] | facts["settings"], inputs | settings)
        shutil.rmtree(partial, ignore_errors=True)
        return _summary(index, "nothing left to do")

    count = sum(1 for tar in tars for sample in read_samples(tar) if sample.image)
    if not count:
        raise RetrievalError(f"{shards}: its shards hold no images (jpg, jpeg, png, webp members)")
    plan, gpu = _plan(count, loaded.config.embed_dim, max_memory, where)
    parts = _embed_parts(loaded, tars, partial, inputs, batch_size, workers)
    whole = partial / "index"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    facts: dict[str, Any] = {
        "tool": f"clip-retrieval {version('clip-retrieval')}",
        "model": str(model.resolve()),
        "shards": str(shards.resolve()),
        "inputs": inputs,
        "settings": settings,
        **_merge(parts, whole, shards, loaded.config.embed_dim),
    }
    facts |= {"plan": asdict(plan), **_build(loaded, plan, whole, target_recall, gpu=gpu)}
    write_facts(whole, facts)
    os.rename(whole, index)
    shutil.rmtree(partial)
    return _summary(index, "built")


def _summary(index: Path, status: str) -> dict[str, Any]:
    facts = read_facts(index)
    shown = ("images", "failed", "dim", "plan", "search", "recall@10", "held_out", "bytes")
    return {"index": str(index), "status": status} | {name: facts[name] for name in shown}


def _inputs(loaded: LoadedModel, shards: Path, tars: Sequence[Path]) -> dict[str, Any]:
    """What the embeddings depend on."""
    manifest = shards / "manifest.json"  # clip-data's; it holds a hash of every tar
    return {
        "fingerprint": loaded.fingerprint,
        "preprocess": loaded.preprocess.hash,
        "shard_bytes": {tar.name: tar.stat().st_size for tar in tars},
        "manifest": hashlib.sha256(manifest.read_bytes()).hexdigest()
        if manifest.is_file()
        else None,
    }


def _refuse_other(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise RetrievalError(
                f"{path} was made with another {name.replace('_', ' ')} "
                f"({str(found.get(name))[:40]}; now {str(value)[:40]}); "
                "give another path, or delete it to build it anew"
            )


def _plan(count: int, dim: int, max_memory: int, device: torch.device) -> tuple[Plan, bool]:
    """The plan, said before the work starts, and whether FAISS uses a GPU for it."""
    gpu = device.type == "cuda" and faiss_index.faiss_has_gpu()
    if device.type == "cuda" and not gpu:
        log.info("this faiss sees no GPU: the index is built on the CPU")
    plan = plan_index(count, dim, max_memory=max_memory, gpu=gpu)
    log.info(
        "plan: %s for %s vectors of %d numbers: %s; %s in memory, %s to build",
        *(plan.family, f"{count:,}", dim, plan.why),
        *(size(plan.index_bytes), size(plan.build_bytes)),
    )
    return plan, gpu


def _embed_parts(
    loaded: LoadedModel,
    tars: Sequence[Path],
    partial: Path,
    inputs: dict[str, Any],
    batch_size: int,
    workers: int,
) -> list[Path]:
    """Embed the shards that have no part yet; the paths of all parts in the order of the tars."""
    begun = partial / "model.json"
    model = {name: inputs[name] for name in ("fingerprint", "preprocess")}
    if begun.is_file():
        _refuse_other(partial, json.loads(begun.read_bytes()), model)
    else:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "parts").mkdir(parents=True)
        temporary = partial / "model.json.tmp"
        temporary.write_text(json.dumps(model), encoding="utf-8")
        os.replace(temporary, begun)

    # a shard that was repaired meanwhile has another name here, and is embedded again
    part_of = {
        tar: partial / "parts" / f"{tar.stem}-{tar.stat().st_size}-{tar.stat().st_mtime_ns}.arrow"
        for tar in tars
    }
    missing = [tar for tar in tars if not part_of[tar].is_file()]
    if missing and len(missing) < len(tars):
        log.info("%d of %d shards are embedded already", len(tars) - len(missing), len(tars))
    for part in embed_images(loaded, missing, batch_size=batch_size, workers=workers):
        write_part(part_of[part.shard], part)
    return list(part_of.values())


def _merge(parts: Sequence[Path], whole: Path, shards: Path, dim: int) -> dict[str, Any]:
    """Write embeddings.npy and metadata.arrow from the parts; returns the counts."""
    counts = [part_counts(part) for part in parts]
    images, failed = sum(c[0] for c in counts), sum(c[1] for c in counts)
    check_failures(failed, images + failed, shards)
    stored_ND = np.lib.format.open_memmap(
        whole / "embeddings.npy", mode="w+", dtype=np.float16, shape=(images, dim)
    )
    row = 0
    for embeddings_ND in merge_parts(parts, whole / "metadata.arrow"):
        stored_ND[row : row + len(embeddings_ND)] = embeddings_ND
        row += len(embeddings_ND)
    stored_ND.flush()
    return {"images": images, "failed": failed, "dim": dim}


def _build(
    loaded: LoadedModel, plan: Plan, whole: Path, target: float, *, gpu: bool
) -> dict[str, Any]:
    """Fill, tune and write image.index; returns the search's parameters and the recall."""
    stored_ND = open_vectors(whole / "embeddings.npy")
    rows = np.random.default_rng(0).permutation(len(stored_ND)).astype(np.int64)
    held = min(_HELD_OUT, len(rows) // 10)
    kept_out, kept = np.sort(rows[:held]), np.sort(rows[held:])

    index = faiss_index.fill(plan, stored_ND, kept, gpu=gpu)
    held_out = _held_out(loaded, whole, stored_ND, kept_out, kept)
    knob, recall = faiss_index.tune(index, plan, stored_ND, held_out, target)
    faiss_index.add(index, stored_ND, kept_out)
    faiss_index.write_index(index, whole / "image.index")

    if recall and min(recall.values()) < target:
        log.warning("recall@10 is below the target of %s at the widest search: %s", target, recall)
    log.info("recall@10 on held-out queries: %s", recall or "not measured, too few images")
    return {
        "search": asdict(knob),
        "recall@10": recall,
        "held_out": {kind: len(q.queries_QD) for kind, q in held_out.items()},
    }


def _held_out(
    loaded: LoadedModel,
    whole: Path,
    stored_ND: Float16,
    kept_out: Int64,
    kept: Int64,
) -> dict[str, faiss_index.Queries]:
    """The rows kept out, and their captions, as queries by kind; a kind without any is absent."""
    queries = {"image": unit_rows(stored_ND[kept_out])} if len(kept_out) else {}
    captions = Metadata(whole / "metadata.arrow").captions(kept_out.tolist())
    if captions:
        queries["text"] = embed_texts(loaded, captions)
    return {kind: faiss_index.Queries.prepare(q, stored_ND, kept) for kind, q in queries.items()}
