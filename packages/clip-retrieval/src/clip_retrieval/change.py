"""Rows added to an index, taken out of it, and indexes merged into one.

Each change writes a whole new generation of the index and then puts it in place (layout.py), so
queries are answered throughout, and a change that is killed is simply made again.
"""

# N rows

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from clip_models import load_model

from clip_retrieval import index as faiss_index
from clip_retrieval.build import (
    check_model,
    choose,
    embed_missing,
    make_generation,
    open_source,
    refuse_other,
    summary,
)
from clip_retrieval.embed import pick_device
from clip_retrieval.errors import RetrievalError
from clip_retrieval.layout import generation, locked, read_facts
from clip_retrieval.metadata import Metadata
from clip_retrieval.plan import Plan
from clip_retrieval.rows import FromEmbeddings, FromIndex, RowSource

log = logging.getLogger(__name__)

_TRAIN_ANEW = 3  # times as many rows, or as few, as the index was trained on


def append(
    model: Path | None,
    source: Path,
    index: Path,
    *,
    batch_size: int = 128,
    workers: int = 2,
    thumbnails: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Add the parts of a source that the index does not hold; continue what was interrupted.

    Args:
        model: where the index's own model lies now, if not where it was.

    Returns:
        As build_index, with the status "appended" or "nothing left to do".

    Raises:
        RetrievalError: no index, another model than the index's, no usable rows.
    """
    where = pick_device(device)
    read_facts(index)
    with locked(index):
        facts = read_facts(index)
        recorded = Path(facts["model"]) if facts["model"] else None
        embeddings, parts = open_source(model or recorded, source)
        loaded = None
        if model or embeddings is None:
            loaded = load_model(model or str(recorded), where)
        inputs = check_model(embeddings, loaded)
        known = {name: value for name, value in inputs.items() if value is not None}
        refuse_other(index, facts["inputs"] | {"width": facts["dim"]}, known)
        inside = {_identity(part) for part in facts["parts"]}
        if embeddings is None and loaded:
            new = [part for part in parts if _identity(part.identity()) not in inside]
            if not new:
                return summary(index, "nothing left to do")
            out = index / f"appending-{_hash(new)}"
            options = {"batch_size": batch_size, "workers": workers, "thumbnails": thumbnails}
            embeddings = embed_missing(loaded, source, new, out, **options)
        if embeddings is None:
            raise RetrievalError(f"{source} holds no embeddings")
        if embeddings.dim != facts["dim"]:
            raise RetrievalError(
                f"{embeddings.path} has rows of {embeddings.dim} numbers, {index} of "
                f"{facts['dim']}; append what the same model made"
            )
        found = embeddings.parts()
        numbers = {n for n, part in enumerate(found) if _identity(part) not in inside}
        if not numbers:
            return summary(index, "nothing left to do")
        old, more = FromIndex(index, facts), FromEmbeddings(embeddings, numbers)
        facts["failed"] += embeddings.failed
        plan = _plan(facts, old.count + more.count, gpu=where.type == "cuda")
        if _trained_anew(facts, plan, old.count + more.count):
            make_generation(index, facts, [old, more], plan, loaded, gpu=where.type == "cuda")
        else:
            trained = _take_over(index, facts)
            sources: list[RowSource] = [old, more]
            make_generation(
                *(index, facts, sources, _as_trained(facts, plan), loaded),
                trained=trained,
                already=old.count,
            )
        for left in index.glob("appending-*"):
            shutil.rmtree(left)
    return summary(index, "appended")


def remove(index: Path, keys: Collection[str], *, device: str = "auto") -> dict[str, Any]:
    """Take the rows with these keys out of the index, their embeddings and metadata too.

    Returns:
        As build_index, with the status "removed" or "nothing left to do", and "removed".

    Raises:
        RetrievalError: no index; nothing would be left.
    """
    where = pick_device(device)
    read_facts(index)
    with locked(index):
        facts = read_facts(index)
        gone = set(keys)
        metadata = Metadata(generation(index, facts) / "metadata.arrow")
        keep_N = np.array([key not in gone for key in metadata.table["key"].to_pylist()])
        removed = int((~keep_N).sum())
        if not removed:
            return summary(index, "nothing left to do") | {"removed": 0}
        if removed == len(keep_N):
            raise RetrievalError(f"{index}: no row would be left; delete the index instead")
        rows = FromIndex(index, facts, keep_N)
        plan = _plan(facts, rows.count, gpu=where.type == "cuda")
        trained = None
        if not _trained_anew(facts, plan, rows.count):
            trained, plan = _take_over(index, facts), _as_trained(facts, plan)
            trained.reset()
        make_generation(
            *(index, facts, [rows], plan, None), trained=trained, gpu=where.type == "cuda"
        )
    return summary(index, "removed") | {"removed": removed}


def merge(out: Path, indexes: Sequence[Path], *, device: str = "auto") -> dict[str, Any]:
    """Build one index of the rows of several, of the same model.

    Raises:
        RetrievalError: they are not of one model, or hold the same part.
    """
    where = pick_device(device)
    all_facts = [read_facts(index) for index in indexes]
    facts: dict[str, Any] = all_facts[0] | {
        "generation": 0,
        "failed": sum(f["failed"] for f in all_facts),
    }
    holder = dict[str, Path]()
    for index, own in zip(indexes, all_facts, strict=True):
        refuse_other(
            index, own["inputs"] | {"width": own["dim"]}, facts["inputs"] | {"width": facts["dim"]}
        )
        for part in map(_identity, own["parts"]):
            if part in holder:
                raise RetrievalError(
                    f"{holder[part]} and {index} both hold {json.loads(part)['name']} of "
                    f"{json.loads(part)['source']}; merge indexes of different pictures"
                )
            holder[part] = index
    if out.exists():
        found = [_identity(part) for part in read_facts(out)["parts"]]
        refuse_other(out, {"rows": sorted(found)}, {"rows": sorted(holder)})
        return summary(out, "nothing left to do")
    sources: list[RowSource] = [
        FromIndex(path, own) for path, own in zip(indexes, all_facts, strict=True)
    ]
    plan = _plan(facts, sum(source.count for source in sources), gpu=where.type == "cuda")
    partial = out.parent / f"{out.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        whole = partial / "index"
        shutil.rmtree(whole, ignore_errors=True)
        make_generation(whole, facts, sources, plan, None, gpu=where.type == "cuda")
        os.rename(whole, out)
        shutil.rmtree(partial)
    return summary(out, "merged")


def _plan(facts: dict[str, Any], count: int, *, gpu: bool) -> Plan:
    return choose(count, facts["dim"], facts["settings"], gpu=gpu)


def _trained_anew(facts: dict[str, Any], plan: Plan, count: int) -> bool:
    """Whether a new FAISS index is made of the rows; that on the disk always is."""
    ratio = count / facts["trained_on"]
    if plan.family != facts["plan"]["family"] or not 1 / _TRAIN_ANEW < ratio < _TRAIN_ANEW:
        log.info("%s rows instead of %s: a new index", f"{count:,}", f"{facts['trained_on']:,}")
        return True
    return plan.family == "on-disk"


def _as_trained(facts: dict[str, Any], plan: Plan) -> Plan:
    """The plan of the FAISS index that is there, with the sizes that it will have now."""
    old = Plan(**facts["plan"])
    return replace(old, index_bytes=plan.index_bytes, build_bytes=plan.build_bytes)


def _take_over(index: Path, facts: dict[str, Any]) -> Any:
    """The FAISS index of the generation that is in place, to be changed in memory."""
    return faiss_index.read_index(generation(index, facts) / "image.index")


def _identity(part: dict[str, Any]) -> str:
    return json.dumps({name: part[name] for name in ("source", "name", "bytes")})


def _hash(parts: Sequence[Any]) -> str:
    text = json.dumps([part.identity() for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
