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
from numpy.typing import NDArray

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
from clip_retrieval.sources import Part

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

    Of a folder of pictures that has changed these are the files whose names the index lacks, those
    that were taken out of it among them.

    Args:
        model: where the index's own model lies now, if not where it was.

    Returns:
        As build_index, with the status "appended" or "nothing left to do".

    Raises:
        RetrievalError: no index, another model than the index's, no usable rows, a part or a file
            that the index holds has changed.
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
        if embeddings is None and loaded:
            new = _new_parts(index, facts, parts)
            if not new:
                return summary(index, "nothing left to do")
            out = index / f"appending-{_hash(new)}"
            options = {"batch_size": batch_size, "workers": workers, "thumbnails": thumbnails}
            embeddings = embed_missing(loaded, source, new, out, **options)
            if parts[0].files:
                facts.setdefault("folders", {})[parts[0].identity()["source"]] = _hash(parts)
        if embeddings is None:
            raise RetrievalError(f"{source} holds no embeddings")
        if embeddings.dim != facts["dim"]:
            raise RetrievalError(
                f"{embeddings.path} has rows of {embeddings.dim} numbers, {index} of "
                f"{facts['dim']}; append what the same model made"
            )
        found = embeddings.parts()
        numbers = {n for n, part in enumerate(found) if _is_new(part, facts["parts"])}
        if not numbers:
            return summary(index, "nothing left to do")
        old, more = FromIndex(index, facts), FromEmbeddings(embeddings, numbers)
        facts["failed"] += embeddings.failed(numbers)
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

    Args:
        keys: KEY, or SOURCE/KEY where several sources hold it.

    Returns:
        As build_index, with the status "removed" or "nothing left to do", and "removed".

    Raises:
        RetrievalError: no index; a key of several sources; nothing would be left.
    """
    where = pick_device(device)
    read_facts(index)
    with locked(index):
        facts = read_facts(index)
        keep_N = ~_named(index, facts, set(keys))
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


def _is_new(part: dict[str, Any], inside: Sequence[dict[str, Any]]) -> bool:
    """Whether the index lacks a part.

    Raises:
        RetrievalError: it has rows of a part of that name that was written at another time.
    """
    alike = [p for p in inside if (p["source"], p["name"]) == (part["source"], part["name"])]
    states = [(p["bytes"], p.get("modified")) for p in alike]
    if (part["bytes"], part.get("modified")) in states:
        return False
    if any(p["rows"] for p in alike):
        raise _changed(Path(part["source"]) / part["name"])
    return True


def _new_parts(index: Path, facts: dict[str, Any], parts: Sequence[Part]) -> list[Part]:
    """The parts that the index lacks; of a folder that it knows, parts of the files that it lacks.

    Raises:
        RetrievalError: a part or a file that it holds has changed.
    """
    source = parts[0].identity()["source"]
    old = [part for part in facts["parts"] if part["source"] == source]
    if not parts[0].files or not old:
        return [part for part in parts if _is_new(part.identity(), old)]
    if facts.get("folders", {}).get(source) == _hash(parts):
        return []  # what was taken out of the index stays out while the folder is the same
    rows = [part["rows"] for part in facts["parts"]]
    own = np.repeat([part["source"] == source for part in facts["parts"]], rows)
    table = Metadata(generation(index, facts) / "metadata.arrow").table.filter(own)
    size_of = dict(zip(table["key"].to_pylist(), table["size"].to_pylist(), strict=True))
    newest = max(part["modified"] for part in old)
    new = list[Part]()
    for part in parts:
        if any(part.identity().items() <= known.items() for known in old):
            continue
        stats = {name: (part.source / name).stat() for name in part.files}
        for name in stats.keys() & size_of.keys():
            if stats[name].st_size != size_of[name] or stats[name].st_mtime_ns > newest:
                raise _changed(part.source / name)
        if more := {name: stats[name] for name in part.files if name not in size_of}:
            length = sum(stat.st_size for stat in more.values())
            modified = max(stat.st_mtime_ns for stat in more.values())
            name = f"part {len(old) + len(new)}"
            new.append(Part(part.source, name, length, modified, files=tuple(more)))
    return new


def _changed(what: Path) -> RetrievalError:
    return RetrievalError(
        f"{what} has changed since it was indexed; take its rows out first (--remove), or append "
        "what is new from a place of its own"
    )


def _named(index: Path, facts: dict[str, Any], keys: set[str]) -> NDArray[np.bool_]:
    """Which rows the keys, or SOURCE/KEY, are of."""
    column = Metadata(generation(index, facts) / "metadata.arrow").table["key"].to_pylist()
    sources = [part["source"] for part in facts["parts"] for _ in range(part["rows"])]
    holders = dict[str, set[str]]()
    named_N = np.zeros(len(column), bool)
    for row, (key, source) in enumerate(zip(column, sources, strict=True)):
        if key in keys:
            holders.setdefault(key, set()).add(source)
        named_N[row] = key in keys or f"{source}/{key}" in keys
    for key, among in holders.items():
        if len(among) > 1:
            which = " or ".join(f"{source}/{key}" for source in sorted(among))
            raise RetrievalError(f"{index}: {key} is in several sources; give {which}")
    return named_N


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
