"""What embeddings are made from: shards, a folder of pictures, or a file of captions.

A source is cut into parts, a shard or some thousand files or lines each. A part's samples are
found without reading their contents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_retrieval.errors import RetrievalError
from clip_retrieval.shards import IMAGE_EXTENSIONS, Sample, list_shards, read_samples

PART_ROWS = 10_000  # of a folder or a file of captions


@dataclass(frozen=True)
class Part:
    """A part of a source.

    Attributes:
        source: the directory of the shards or pictures, or the file of captions.
        name: the tar's file name, or "part N".
        length: bytes of the part, and
        modified: when it was written, in ns: what tells it from another of the same name.
        files: pictures of a folder, their paths within it; empty for a shard.
        captions: of a file of captions; empty otherwise.
    """

    source: Path
    name: str
    length: int
    modified: int
    files: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The part's tar, or its name within the source, for messages."""
        return self.source / self.name

    def samples(self) -> list[Sample]:
        """The pictures of a shard or folder and what lies beside them, in order."""
        if not self.files:
            return list(read_samples(self.path))
        return [_file_sample(self.source, name) for name in self.files]

    def image_file(self, sample: Sample) -> str:
        """The file that holds a sample's picture, within the source."""
        return sample.key if self.files else self.name

    def read(self, sample: Sample, extension: str) -> bytes:
        """The bytes of one member of a sample."""
        offset, size = sample.members[extension]
        path = self.source / self.image_file(sample)
        if self.files and extension in ("txt", "json"):
            path = path.with_suffix(f".{extension}")
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def identity(self) -> dict[str, str | int]:
        """What tells it from other parts."""
        source = str(self.source.resolve())
        return {
            "source": source,
            "name": self.name,
            "bytes": self.length,
            "modified": self.modified,
        }


def shard_part(shard: Path) -> Part:
    """A tar as a part."""
    return Part(shard.parent, shard.name, shard.stat().st_size, shard.stat().st_mtime_ns)


def list_parts(source: Path) -> list[Part]:
    """The parts of a source, in order.

    Raises:
        RetrievalError: it is nothing of the three, or is empty.
    """
    if source.is_file():
        return _caption_parts(source)
    if not source.is_dir():
        raise RetrievalError(
            f"{source} is not there; give a directory of shards or pictures, or a file of captions"
        )
    if (source / "nshards.txt").is_file() or next(source.glob("*.tar"), None):
        return [shard_part(shard) for shard in list_shards(source)]
    files = sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()
    )
    if not files:
        raise RetrievalError(
            f"{source} holds no .tar shard and no picture ({', '.join(IMAGE_EXTENSIONS)}); give a "
            "directory of shards (`clip-data build` makes one), one split of a set, like SET/test, "
            "or a folder of pictures"
        )
    parts: list[Part] = []
    for n, some in enumerate(_cut(files)):
        found = [(source / file).stat() for file in some]
        length, modified = sum(f.st_size for f in found), max(f.st_mtime_ns for f in found)
        parts.append(Part(source, f"part {n}", length, modified, files=some))
    return parts


def _caption_parts(source: Path) -> list[Part]:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RetrievalError(
            f"{source} is not UTF-8 text ({error}); expected a caption on each line"
        ) from error
    modified = source.stat().st_mtime_ns
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise RetrievalError(f"{source} holds no captions; expected one on each line")
    return [
        Part(source, f"part {n}", len("\n".join(some).encode()), modified, captions=some)
        for n, some in enumerate(_cut(captions))
    ]


def _cut(items: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(items[i : i + PART_ROWS]) for i in range(0, len(items), PART_ROWS)]


def _file_sample(source: Path, name: str) -> Sample:
    """A picture of a folder; a .txt and .json of its name go with it."""
    path = source / name
    members = {path.suffix[1:].lower(): (0, path.stat().st_size)}
    for extension in ("txt", "json"):
        beside = path.with_suffix(f".{extension}")
        if beside.is_file():
            members[extension] = (0, beside.stat().st_size)
    return Sample(name, members)
