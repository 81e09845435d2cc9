"""WebDataset's tars: written so that their bytes depend on their members alone, read by offset."""

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, BinaryIO, cast

from upath import UPath

FORMAT = 1

IMAGES = ("jpg", "jpeg", "png", "webp")

# Where a member's data lies in its tar: [offset, size].
Span = list[int]

# A sample as it lies in a tar: its key, and where the data of each extension lies.
Spans = tuple[str, dict[str, Span]]


class TarWriter:
    """An uncompressed tar (POSIX ustar) whose bytes depend on its members alone."""

    def __init__(self, file: BinaryIO) -> None:
        self.bytes = 0
        self._file = file
        self._sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> Span:
        """Append a member; where its data lies."""
        header = _header(name, len(data))
        span = [self.bytes + len(header), len(data)]
        self._write(b"".join((header, data, bytes(-len(data) % tarfile.BLOCKSIZE))))
        return span

    def close(self) -> None:
        """Append the end-of-archive marker, padded to a whole record as tar does."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))

    @property
    def sha256(self) -> str:
        """Of all the bytes written."""
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.bytes += len(data)


def _header(name: str, size: int) -> bytes:
    """Of a file of mode 0644, owner 0 and mtime 0; `TarInfo.tobuf` takes twenty times as long."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > 100 or size >= 8**11 or b"\0" in encoded:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.USTAR_FORMAT)
    fields = b"%b0000644\x000000000\x000000000\x00%011o\x0000000000000\x00" % (
        encoded.ljust(100, b"\0"),
        size,
    )
    rest = b"0".ljust(101, b"\0") + b"ustar\x0000"
    checksum = sum(fields) + 8 * ord(" ") + sum(rest)
    return (fields + b"%06o\0 " % checksum + rest).ljust(tarfile.BLOCKSIZE, b"\0")


def read_samples(file: BinaryIO) -> Iterator[Spans]:
    """The samples of an open tar: runs of members with one key, as readers group them.

    A member may be read by `read_span` before the next sample is asked for.

    Raises:
        tarfile.TarError: the tar is damaged or has no end.
    """
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        members = ((*_split_name(m.name), [m.offset_data, m.size]) for m in _members(tar))
        for key, run in groupby(members, key=lambda member: member[0]):
            yield key, {extension: span for _, extension, span in run}
        end = tar.offset
    file.seek(end)
    if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end-of-archive marker at byte {end}")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        cast(Any, tar).members.clear()  # else it remembers all
        if member.isfile():
            yield member


def read_span(file: BinaryIO, span: Span) -> bytes:
    """The data of a member."""
    offset, size = span
    file.seek(offset)
    return file.read(size)


def tar_size(file: BinaryIO) -> int:
    """Bytes of an open tar."""
    return file.seek(0, os.SEEK_END)


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def index_path(tar: UPath) -> UPath:
    """NNNNN.index.json of NNNNN.tar."""
    return tar.with_suffix(".index.json")


def build_index(
    tar_bytes: int, samples: Iterable[tuple[str, Mapping[str, Span]]]
) -> dict[str, Any]:
    """The contents of NNNNN.index.json: `keys`, and for each extension a list parallel to them."""
    keys: list[str] = []
    members: dict[str, list[Span | None]] = {}
    for row, (key, spans) in enumerate(samples):
        keys.append(key)
        for extension in [*members, *(e for e in spans if e not in members)]:
            column = members.setdefault(extension, [None] * row)
            column.append(spans.get(extension))
    return {"format": FORMAT, "tar_bytes": tar_bytes, "keys": keys, "members": members}
