"""pHash (DCT) of every image of a shard: 64 bits that outlast re-encoding and resizing."""

import hashlib
import io
import json
import warnings
from dataclasses import asdict, dataclass

import imagehash
import numpy as np
from PIL import Image
from upath import UPath

from clip_data.atomic import write_text
from clip_data.errors import RowError
from clip_data.sidecars import read_members
from clip_data.tar import IMAGES, read_span

# The hash of an image that has none; as that of a black one it is never compared.
NO_HASH = 0

# What is found under the extensions of images. Not EPS, which is a program; MPO opens as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class ShardHashes:
    """The hashes of a shard's samples, in the order of the tar."""

    keys: list[str]
    hashes: list[int]
    """64 bits each, as `imagehash` prints them; NO_HASH where there is none."""
    faults: dict[str, str]
    """Why a sample has no hash, by its key."""


@dataclass(frozen=True)
class HashJob:
    """A shard, and the file that keeps its hashes."""

    tar: UPath
    file: UPath


def hash_job(tar: UPath, folder: UPath) -> HashJob:
    """The job of a tar. Its file is found again as long as the tar's size and time stay."""
    about = tar.stat()
    name = hashlib.sha256(f"{tar} {about.st_size} {about.st_mtime}".encode()).hexdigest()
    return HashJob(tar, folder / f"{name}.json")


def hash_shard(job: HashJob) -> None:
    """Write the file of hashes, if it is not there.

    Raises:
        DataError: the tar is damaged.
    """
    if job.file.exists():
        return
    shard = ShardHashes([], [], {})
    with job.tar.open("rb") as file:
        for key, spans in read_members(job.tar, file):
            image = next((span for extension, span in spans.items() if extension in IMAGES), None)
            shard.keys.append(key)
            try:
                if image is None:
                    raise RowError("no image")
                shard.hashes.append(hash_image(read_span(file, image)))
            except RowError as error:
                shard.hashes.append(NO_HASH)
                shard.faults[key] = error.reason
    write_text(job.file, json.dumps(asdict(shard)))


def read_hashes(job: HashJob) -> ShardHashes:
    """What `hash_shard` has written."""
    return ShardHashes(**json.loads(job.file.read_bytes()))


def hash_image(data: bytes) -> int:
    """`imagehash.phash` of an encoded image, decoded in full: a JPEG's draft has other bits.

    Raises:
        RowError: the image cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on harmless metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                bits = imagehash.phash(image).hash
    except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
        raise RowError("undecodable image", str(error)) from error
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
