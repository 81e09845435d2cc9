"""A source and a model directory -> a folder of embeddings, part by part.

Parts are divided among the processes. A part that is there is whole, so a run that was killed
continues with the parts that are missing.
"""

# N rows, D embedding width

import json
import logging
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
from clip_models import LoadedModel, load_model
from tqdm import tqdm

from clip_retrieval.embed import (
    Embedded,
    Record,
    check_failures,
    embed_images,
    embed_texts,
    pick_device,
)
from clip_retrieval.embeddings import (
    FACTS,
    Embeddings,
    forget_part,
    parts_done,
    read_facts,
    write_part,
)
from clip_retrieval.errors import RetrievalError
from clip_retrieval.metadata import COLUMNS
from clip_retrieval.processes import join_processes
from clip_retrieval.sources import PART_ROWS, Part, list_parts

log = logging.getLogger(__name__)


def embed_source(
    model: Path,
    source: Path,
    out: Path,
    *,
    batch_size: int = 128,
    workers: int = 2,
    thumbnails: int = 0,
    device: str = "auto",
) -> dict[str, Any] | None:
    """Embed pictures and their captions, or captions, into `out`; continue what was begun there.

    Args:
        source: a directory of shards or pictures, or a file with a caption on each line.
        thumbnails: longer side of a JPEG to keep of each picture; 0: none.

    Returns:
        "embeddings" (its path), "status" ("embedded" or "nothing left to do"), "parts", "rows",
        "failed", "dim" and "fingerprint"; None in every process but the first.

    Raises:
        RetrievalError: no usable source, another model or source than those of what is there.
    """
    processes = join_processes()
    if processes is not None and device == "auto":
        device = str(processes.device)
    rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
    parts = list_parts(source)
    loaded = load_model(model, pick_device(device))
    if rank == 0:
        begin(out, loaded, source, parts, thumbnails)
    if processes:
        processes.wait_for_everyone()
    done = parts_done(out)
    missing = [number for number in range(rank, len(parts), world) if number not in done]
    embed_parts(
        *(loaded, parts, missing, out),
        texts=True,
        batch_size=batch_size,
        workers=workers,
        thumbnails=thumbnails,
    )
    if processes:
        processes.wait_for_everyone()
    if rank:
        return None
    embedded = Embeddings(out)
    failed = embedded.failed()
    check_failures(failed, embedded.count + failed, source)
    return {
        "embeddings": str(out),
        "status": "embedded" if len(done) < len(parts) else "nothing left to do",
        "parts": len(parts),
        "rows": embedded.count,
        "failed": failed,
        "dim": embedded.dim,
        "fingerprint": loaded.fingerprint,
    }


def begin(
    out: Path, loaded: LoadedModel, source: Path, parts: Sequence[Part], thumbnails: int
) -> None:
    """Write embeddings.json, or see that the one that is there says the same.

    Raises:
        RetrievalError: it was begun with another model, source or size of thumbnails.
    """
    facts: dict[str, Any] = {
        "tool": f"clip-retrieval {version('clip-retrieval')}",
        "model": str(loaded.path.resolve()),
        "fingerprint": loaded.fingerprint,
        "preprocess": loaded.preprocess.hash,
        "dim": loaded.config.embed_dim,
        "thumbnails": thumbnails,
        "parts": [part.identity() for part in parts],
    }
    file = out / FACTS
    temporary = out / f"{FACTS}.tmp"  # all that is left of a run that was killed at once
    if file.is_file():
        _take_up(out, read_facts(out), facts)
    elif out.is_dir() and any(child != temporary for child in out.iterdir()):
        raise RetrievalError(f"{out} is not empty and has no {FACTS}; give another path")
    out.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _take_up(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Parts of files that were repaired meanwhile are forgotten, to be embedded again."""
    changed = [
        number
        for number, (old, new) in enumerate(zip(found["parts"], wanted["parts"], strict=False))
        if old != new and _place(old) == _place(new)
    ]
    for name in ("fingerprint", "preprocess", "thumbnails"):
        if found.get(name) != wanted[name]:
            raise _other(out, name, found.get(name), wanted[name])
    old, new = ([_place(part) for part in facts["parts"]] for facts in (found, wanted))
    if old != new:
        raise _other(out, "source", old, new)
    for number in changed:
        log.info("%s has changed, it is embedded again", new[number][1])
        forget_part(out, number)


def _place(part: dict[str, Any]) -> tuple[str, str]:
    return part["source"], part["name"]


def _other(out: Path, name: str, found: object, wanted: object) -> RetrievalError:
    return RetrievalError(
        f"{out} was made with another {name} ({str(found)[:60]}; now {str(wanted)[:60]}); "
        "give another path, or delete it to start anew"
    )


def embed_parts(
    loaded: LoadedModel,
    parts: Sequence[Part],
    missing: Sequence[int],
    out: Path,
    *,
    texts: bool,
    batch_size: int,
    workers: int,
    thumbnails: int,
) -> None:
    """Embed and write the parts numbered.

    Args:
        texts: the captions as well.
    """
    if missing and len(missing) < len(parts):
        log.info("%d of %d parts are left to embed here", len(missing), len(parts))
    wanted = [parts[number] for number in missing]
    if wanted and wanted[0].captions:
        found = _embed_captions(loaded, wanted)
    else:
        found = embed_images(
            loaded, wanted, batch_size=batch_size, workers=workers, thumbnails=thumbnails
        )
    for number, embedded in zip(missing, found, strict=True):
        records, captions = embedded.records, [record.caption for record in embedded.records]
        arrays = {"img_emb": embedded.embeddings_ND}
        if parts[number].captions:
            arrays = {"text_emb": embedded.embeddings_ND}
        elif texts and any(captions):
            # clip-retrieval reads the two beside each other: a row per row, of "" without caption
            first = [(caption or "").partition("\n")[0] for caption in captions]
            arrays["text_emb"] = embed_texts(loaded, first)
        rows = [vars(record) | {"url": _url(record)} for record in records]
        table = pa.Table.from_pylist(rows, schema=COLUMNS)
        table = table.replace_schema_metadata({"failed": str(len(embedded.failures))})
        write_part(out, number, len(parts), arrays, table)


def _embed_captions(loaded: LoadedModel, parts: Sequence[Part]) -> Iterator[Embedded]:
    for part in tqdm(parts, unit=" parts", disable=None):
        first = PART_ROWS * int(part.name.removeprefix("part "))
        records = [
            Record(f"{line:09d}", caption, None, part.source.name, 0, 0)
            for line, caption in enumerate(part.captions, first)
        ]
        yield Embedded(part.path, records, embed_texts(loaded, part.captions), [])


def _url(record: Record) -> str | None:
    """Where img2dataset says that the picture came from."""
    try:
        told = json.loads(record.json) if record.json else None
    except ValueError:
        return None
    url = told.get("url") if isinstance(told, dict) else None
    # half of a surrogate pair, which JSON can hold, is no UTF-8
    return url.encode("utf-8", "replace").decode() if isinstance(url, str) else None
