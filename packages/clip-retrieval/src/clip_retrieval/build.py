"""A folder of embeddings, or a source and a model directory -> an index directory.

Pictures are embedded part by part into INDEX.partial/embeddings; a build that is killed continues
with what is missing. INDEX itself appears whole, by a rename.
"""

# N rows

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from clip_models import LoadedModel, load_model

from clip_retrieval import index as faiss_index
from clip_retrieval.embed import check_failures, embed_texts, pick_device
from clip_retrieval.embed_parts import begin, embed_parts
from clip_retrieval.embeddings import Embeddings, is_embeddings, parts_done
from clip_retrieval.errors import RetrievalError
from clip_retrieval.layout import generation, locked, read_facts, write_facts
from clip_retrieval.metadata import Metadata
from clip_retrieval.plan import Plan, plan_index, size
from clip_retrieval.rows import FromEmbeddings, HeldOut, RowSource, write_rows
from clip_retrieval.sources import Part, list_parts
from clip_retrieval.tune import Queries, tune
from clip_retrieval.vectors import Rows, unit_rows

log = logging.getLogger(__name__)

_ENOUGH_QUERIES = 100  # new rows that the search of a grown index is tuned with


def build_index(
    model: Path | None,
    source: Path,
    index: Path,
    *,
    target_recall: float = 0.95,
    max_memory: int = 4 << 30,
    family: str | None = None,
    batch_size: int = 128,
    workers: int = 2,
    thumbnails: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Build `index`, or continue a build that was interrupted.

    Args:
        model: the model directory; None where embeddings.json names it, or for an index that
            knows no model and is asked by embeddings.
        source: embeddings, shards, a folder of pictures, or a file of captions.
        target_recall: of the ten nearest, the share the search must find.
        max_memory: bytes the index may take, at its peak, while it is built.
        family: one of plan.FAMILIES, instead of the choice.
        thumbnails: longer side of a JPEG to keep of each picture embedded; 0: none.

    Returns:
        "index" (its path), "status" ("built", or "nothing left to do" where it is there already)
        and what index.json says of the result.

    Raises:
        RetrievalError: no usable rows, other inputs than those of what is there, no memory.
    """
    settings = {"target_recall": target_recall, "max_memory": max_memory, "family": family}
    if index.exists() and not (index / "index.json").is_file():
        raise RetrievalError(f"{index} exists and is no index; give another path")
    where = pick_device(device)
    embeddings, parts = open_source(model, source)
    loaded = load_model(model, where) if model else None
    inputs = check_model(embeddings, loaded)
    partial = index.parent / f"{index.name}.partial"
    if index.exists():
        facts = read_facts(index)
        found = facts["inputs"] | facts["settings"] | {"source": _names(facts["parts"])}
        now = embeddings.parts() if embeddings else [part.identity() for part in parts]
        refuse_other(index, found, inputs | settings | {"source": _names(now)})
        shutil.rmtree(partial, ignore_errors=True)
        return summary(index, "nothing left to do")

    if embeddings is None and loaded:  # sooner said than after all are embedded
        count = sum(len(p.captions) or sum(bool(s.image) for s in p.samples()) for p in parts)
        if not count:
            raise RetrievalError(f"{source} holds no images (jpg, jpeg, png, webp members)")
        choose(count, loaded.config.embed_dim, settings, gpu=where.type == "cuda")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        if embeddings is None and loaded:
            options = {"batch_size": batch_size, "workers": workers, "thumbnails": thumbnails}
            embeddings = embed_missing(loaded, source, parts, partial / "embeddings", **options)
        if embeddings is None:
            raise RetrievalError(f"{source} holds no embeddings; give the model directory as well")
        whole = partial / "index"
        shutil.rmtree(whole, ignore_errors=True)
        rows = FromEmbeddings(embeddings)
        facts = {
            "tool": f"clip-retrieval {version('clip-retrieval')}",
            "model": str(loaded.path.resolve()) if loaded else embeddings.facts.get("model"),
            "inputs": inputs,
            "settings": settings,
            "failed": embeddings.failed(),
            "dim": embeddings.dim,
        }
        plan = choose(rows.count, embeddings.dim, settings, gpu=where.type == "cuda")
        make_generation(whole, facts, [rows], plan, loaded, gpu=where.type == "cuda")
        os.rename(whole, index)
        shutil.rmtree(partial)
    return summary(index, "built")


def summary(index: Path, status: str) -> dict[str, Any]:
    """What the commands print of an index."""
    facts = read_facts(index)
    shown = ("images", "failed", "dim", "plan", "search", "recall@10", "held_out", "bytes")
    return {"index": str(index), "status": status} | {name: facts[name] for name in shown}


def open_source(model: Path | None, source: Path) -> tuple[Embeddings | None, list[Part]]:
    """A source's embeddings, or else its parts, which a model is to embed."""
    if is_embeddings(source):
        return Embeddings(source), []
    if model is None:
        raise RetrievalError(
            f"{source} holds no embeddings (img_emb or text_emb); give the model directory as well"
        )
    return None, list_parts(source)


def check_model(embeddings: Embeddings | None, loaded: LoadedModel | None) -> dict[str, Any]:
    """What the rows depend on: the model's fingerprint and preprocessing; None: not known.

    Raises:
        RetrievalError: the embeddings are another model's, or have another width.
    """
    told = embeddings.facts if embeddings else {}
    inputs = {name: told.get(name) for name in ("fingerprint", "preprocess")}
    if loaded is None:
        return inputs
    own = {"fingerprint": loaded.fingerprint, "preprocess": loaded.preprocess.hash}
    if embeddings and embeddings.dim != (width := loaded.config.embed_dim):
        raise RetrievalError(
            f"{embeddings.path} has rows of {embeddings.dim} numbers, {loaded.path} makes {width}; "
            "give the model that they were made with"
        )
    for name, value in own.items():
        if embeddings and inputs[name] not in (None, value):
            raise RetrievalError(
                f"{embeddings.path} was not made with {loaded.path}: {name} "
                f"{str(inputs[name])[:20]}…, the model's {value[:20]}…; give {told['model']}"
            )
    return own


def refuse_other(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises RetrievalError naming the first value that differs."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise RetrievalError(
                f"{path} was made with another {name.replace('_', ' ')} "
                f"({str(found.get(name))[:60]}; now {str(value)[:60]}); give another path, "
                "--append, or delete it to build it anew"
            )


def _names(parts: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{p['source']}/{p['name']}, {p['bytes']} bytes" for p in parts]


def choose(count: int, dim: int, settings: dict[str, Any], *, gpu: bool) -> Plan:
    """The plan, said before the work starts."""
    can = gpu and faiss_index.faiss_has_gpu()
    if gpu and not can:
        log.info("this faiss sees no GPU: the index is built on the CPU")
    plan = plan_index(
        *(count, dim),
        max_memory=settings["max_memory"],
        target=settings["target_recall"],
        gpu=can,
        family=settings["family"],
    )
    log.info(
        "plan: %s for %s vectors of %d numbers: %s; %s in memory, %s to build",
        *(plan.family, f"{count:,}", dim, plan.why),
        *(size(plan.index_bytes), size(plan.build_bytes)),
    )
    return plan


def embed_missing(
    loaded: LoadedModel, source: Path, parts: Sequence[Part], out: Path, **options: int
) -> Embeddings:
    """The parts' embeddings, without captions; those that are there already are not made again."""
    begin(out, loaded, source, parts, options["thumbnails"])
    done = parts_done(out)
    missing = [number for number in range(len(parts)) if number not in done]
    embed_parts(loaded, parts, missing, out, texts=False, **options)
    embedded = Embeddings(out)
    failed = embedded.failed()
    check_failures(failed, embedded.count + failed, source)
    return embedded


def make_generation(
    path: Path,
    facts: dict[str, Any],
    sources: Sequence[RowSource],
    plan: Plan,
    loaded: LoadedModel | None,
    *,
    trained: Any = None,
    already: int = 0,
    gpu: bool = False,
) -> None:
    """Write the files of the next generation of `path`, and put it in place.

    Args:
        facts: of the generation before, or of a new index.
        trained: FAISS's index to go on with, of the same plan; None: a new one.
        already: rows, the first ones, that it holds.
    """
    facts = facts | {"generation": facts.get("generation", 0) + 1}
    files = generation(path, facts)
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    held = write_rows(files, sources, facts["dim"])
    rows = Rows(files / "rows.index")
    numbers = np.arange(len(rows), dtype=np.int64)
    # at most half of the rows: little else may be left by a removal
    held_rows = held.rows_H[held.rows_H >= already][: len(rows) // 2]
    kept_out = np.isin(numbers, held_rows)
    to_add = numbers[(numbers >= already) & ~kept_out]
    if trained is None:
        index = faiss_index.fill(plan, rows, to_add, files, gpu=gpu)
        facts["trained_on"] = len(rows)
    else:
        index = trained
        faiss_index.add(index, rows, to_add)
    if loaded:
        held = _with_captions(held, files, loaded)
    held.save(files / "held_out.npz")
    asked_rows = held_rows
    if len(held_rows) < _ENOUGH_QUERIES:  # those of before, which the index holds, are asked too
        asked_rows = np.union1d(held_rows, held.rows_H[held.rows_H < already])
    asked = {"image": rows.unit(asked_rows), "text": unit_rows(held.texts_ND)}
    queries = {
        kind: Queries.prepare(
            queries_QD, rows, numbers[~kept_out], asked_rows < already if kind == "image" else None
        )
        for kind, queries_QD in asked.items()
        if len(queries_QD)
    }
    searcher = faiss_index.Searcher(index, rows)
    knob, recall = tune(searcher, plan, queries, facts["settings"]["target_recall"])
    index = faiss_index.finish(index, plan, rows, held_rows, files)
    faiss_index.write_index(index, files / "image.index")
    facts |= {
        "images": len(rows),
        "parts": [part for source in sources for part in source.parts],
        "plan": asdict(plan),
        "search": asdict(knob),
        "recall@10": recall,
        "held_out": {kind: len(q.queries_QD) for kind, q in queries.items()},
    }
    write_facts(path, facts)


def _with_captions(held: HeldOut, files: Path, loaded: LoadedModel) -> HeldOut:
    """With the captions of those of its rows that have no text query yet."""
    metadata = Metadata(files / "metadata.arrow")
    silent = np.setdiff1d(held.rows_H, held.text_rows).tolist()
    found = {row: text for row in silent for text in metadata.captions([row])}
    if not found:
        return held
    texts_ND = embed_texts(loaded, list(found.values())).astype(np.float16)
    texts_ND = np.concatenate([held.texts_ND, texts_ND])
    return HeldOut(held.rows_H, texts_ND, np.concatenate([held.text_rows, list(found)]))
