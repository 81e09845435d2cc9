"""Shards as `clip-data build`, img2dataset and others write them, made without any of these."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from clip_data.shards import ShardStats, write_stats
from clip_data.tar import TarWriter, build_index
from upath import UPath

from .conftest import picture

SCHEMA = pa.schema(
    {
        "url": pa.string(),
        "key": pa.string(),
        "status": pa.dictionary(pa.int8(), pa.string()),
        "caption": pa.string(),
        "width": pa.int32(),
        "height": pa.uint16(),
        "similarity": pa.float32(),
        "score": pa.string(),  # a number, as a CSV has it
        "NSFW": pa.string(),
        "tags": pa.list_(pa.string()),
        "watermarked": pa.bool_(),
        "hash": pa.uint64(),
        "WIDTH": pa.int64(),  # of the source's own, as LAION has it
    },
    metadata={"made by": "hand"},
)


def row(shard: int, number: int) -> dict[str, Any]:
    """What a parquet says of a sample; every tenth has failed and is in no tar."""
    n = 100 * shard + number
    return {
        "url": f"http://a.example/{n}",
        "key": f"{shard:05d}{number:04d}",
        "status": "failed" if number % 10 == 7 else "success",
        "caption": None if n % 23 == 3 else f"picture {n}" if n % 5 else str(n),
        "width": 100 + n * 37 % 300,
        "height": 100 + n * 53 % 300,
        "similarity": float("nan") if n % 11 == 0 else (n * 7 % 50) / 100,
        "score": "" if n % 13 == 0 else str(n * 3 % 40 / 4),
        "NSFW": ("UNLIKELY", "NSFW", "UNSURE", None, "it's")[n % 5],
        "tags": ["a", "b"][: n % 3],
        "watermarked": n % 2 == 0,
        "hash": 2**64 - 1 - n,
        "WIDTH": n,
    }


def write_shards(folder: Path | UPath, rows: Sequence[int], kind: str = "ours") -> UPath:
    """Shards of so many rows each; `kind`: ours, img2dataset (no index), or plain (tars only)."""
    folder = UPath(folder)
    folder.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    for shard, count in enumerate(rows):
        tar = folder / f"{shard:05d}.tar"
        records = [row(shard, number) for number in range(count)]
        good = [record for record in records if record["status"] == "success"]
        buffer, samples = io.BytesIO(), []
        writer = TarWriter(buffer)
        for record in good:
            members = {
                "jpg": picture(record["WIDTH"], "JPEG"),
                "txt": str(record["caption"]).encode(),
                "json": json.dumps({"key": record["key"]}).encode(),
            }
            if record["WIDTH"] % 2:  # not always in the same order
                members = dict(reversed(members.items()))
            spans = {e: writer.add(f"{record['key']}.{e}", data) for e, data in members.items()}
            samples.append((record["key"], spans))
        writer.close()
        tar.write_bytes(buffer.getvalue())
        stem = folder / f"{shard:05d}"
        if kind != "plain":
            with (folder / f"{stem.name}.parquet").open("wb") as file:
                pq.write_table(pa.Table.from_pylist(records, SCHEMA), file)
        if kind == "img2dataset":
            stats = {"count": count, "successes": len(good), "status_dict": {}}
            (folder / f"{stem.name}_stats.json").write_text(json.dumps(stats))
        if kind == "ours":
            index = build_index(writer.bytes, samples)
            (folder / f"{stem.name}.index.json").write_text(json.dumps(index))
            failed = count - len(good)
            about = {"samples": len(good), "bytes": writer.bytes, "sha256": writer.sha256}
            shards.append({"name": tar.name, **about})
            write_stats(
                tar,
                ShardStats(
                    **shards[-1],
                    digest="of the build",
                    failed=failed,
                    reasons={"missing file": failed} if failed else {},
                    remarks={},
                    first_failures=[],
                ),
            )
    if kind == "ours":
        (folder / "manifest.json").write_text(json.dumps({"shards": shards}))
    return folder


def members(folder: Path | UPath) -> dict[str, list[tuple[str, bytes]]]:
    """The members of each sample in the order of the tar, as tarfile reads them."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    for path in sorted(UPath(folder).glob("*.tar"), key=lambda path: (len(path.name), path.name)):
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(member.name.split(".")[0], []).append((member.name, file.read()))
    return found
