"""Duplicates by perceptual hash, against imagehash and a comparison of all pairs."""

import io
import json
import tarfile
from pathlib import Path

import imagehash
import numpy as np
import pyarrow.parquet as pq
import pytest
from clip_data.duplicates import DedupReport, dedup
from clip_data.errors import DataError
from clip_data.near_hashes import HashIndex, first_that_stay, has_information, nearest
from clip_data.perceptual_hash import hash_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from upath import UPath


def photo(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A smooth random picture: no other number is near it."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel_off(image: Image.Image) -> Image.Image:
    """One pixel changed."""
    other = image.copy()
    other.putpixel((5, 5), (0, 255, 0))
    return other


def write_shards(folder: Path, images: list[bytes], per_shard: int = 4) -> Path:
    """Plain tars of images, img2dataset's keys and no sidecars."""
    folder.mkdir(parents=True, exist_ok=True)
    for begin in range(0, len(images), per_shard):
        with tarfile.open(folder / f"{begin // per_shard:05d}.tar", "w") as tar:
            for number, data in enumerate(images[begin : begin + per_shard], begin):
                suffix = "jpg" if data[:2] == b"\xff\xd8" else "png"
                for name, content in ((suffix, data), ("txt", b"a caption")):
                    member = tarfile.TarInfo(f"{number:09d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def keys(folder: Path) -> list[str]:
    """Of all samples of a folder of tars."""
    names: list[str] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names += [name.partition(".")[0] for name in tar.getnames()]
    return list(dict.fromkeys(names))


def oracle_hash(data: bytes) -> int:
    return int(str(imagehash.phash(Image.open(io.BytesIO(data)))), 16)


def greedy(hashes: list[int], distance: int) -> list[int]:
    """For each the number of the first one near it that stays, itself if it stays: all pairs."""
    leaders: list[int] = []
    for number, value in enumerate(hashes):
        stay = (n for n in range(number) if leaders[n] == n)
        near = (n for n in stay if (hashes[n] ^ value).bit_count() <= distance)
        leaders.append(next(near, number))
    return leaders


@st.composite
def clustered(draw: st.DrawFn) -> list[int]:
    """Hashes some of which are a few bits from one another."""
    seeds = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6))
    flips = st.lists(st.integers(0, 63), max_size=20)
    pairs = draw(st.lists(st.tuples(st.sampled_from(seeds), flips), min_size=1, max_size=60))
    return [seed ^ sum({1 << bit for bit in bits}) for seed, bits in pairs]


@settings(max_examples=60, deadline=None)
@given(hashes=clustered(), queries=clustered(), distance=st.integers(0, 16))
def test_near_hashes_are_those_of_all_pairs(
    hashes: list[int], queries: list[int], distance: int
) -> None:
    array, asked = np.array(hashes, np.uint64), np.array([*queries, *hashes[:5]], np.uint64)
    distinct = np.unique(array)
    apart = np.bitwise_count(asked[:, None] ^ distinct)
    found = HashIndex(distinct, distance).pairs(asked)
    pairs = {triple for part in found for triple in zip(*(p.tolist() for p in part), strict=True)}
    expected = zip(*np.nonzero(apart <= distance), apart[apart <= distance], strict=True)
    assert pairs == {tuple(map(int, triple)) for triple in expected}
    assert first_that_stay(array, distance).tolist() == greedy(hashes, distance)
    apart = np.bitwise_count(asked[:, None] ^ array).astype(int)
    number, hit = nearest(asked, array, distance)
    assert number.tolist() == np.where(apart.min(1) <= distance, apart.argmin(1), -1).tolist()
    assert hit.tolist() == (apart.min(0) <= distance).tolist()


def test_more_hashes_than_are_looked_up_at_a_time() -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 2**64, 300, np.uint64)
    bits = np.uint64(1) << random.integers(0, 64, (1500, 4)).astype(np.uint64)
    hashes = base[random.integers(0, 300, 1500)] ^ np.bitwise_xor.reduce(bits, 1)
    for distance in (0, 3, 5):
        assert first_that_stay(hashes, distance).tolist() == greedy(hashes.tolist(), distance)


def test_hash_is_imagehash_of_the_decoded_image() -> None:
    for number in range(5):
        image = photo(number, (200, 150))
        for data in (encode(image), encode(image, "JPEG", quality=60), encode(image.convert("P"))):
            assert hash_image(data) == oracle_hash(data)
    plain = [hash_image(encode(Image.new("L", (40, 30), grey))) for grey in range(256)]
    assert not has_information(np.array(plain, np.uint64)).any()


def planted() -> list[bytes]:
    """Twelve pictures, then copies of the first three: re-encoded, resized, one pixel off."""
    images = [photo(number) for number in range(12)]
    copies = [encode(images[0], "JPEG", quality=70), encode(images[1].resize((96, 72)))]
    return [encode(image) for image in images] + [*copies, encode(pixel_off(images[2]))]


@pytest.mark.parametrize("distance", [0, 1, 4, 16])
def test_itself(tmp_path: Path, distance: int) -> None:
    images = planted()
    images += [encode(Image.new("RGB", (9, 9), c)) for c in ("red", "red", "black", "black")]
    images += [images[4], b"\x89PNG no picture"]
    source = write_shards(tmp_path / "in", images)
    report = tmp_path / "out.jsonl"
    result = dedup(UPath(source), UPath(tmp_path / "out"), distance=distance, report=UPath(report))
    hashes = [oracle_hash(data) for data in images[:-1]]
    compared = [n for n, value in enumerate(hashes) if value.bit_count() > 1]
    leaders = greedy([hashes[n] for n in compared], distance)
    duplicate_of = {n: compared[m] for n, m in zip(compared, leaders, strict=True)}
    dropped = [n for n in compared if duplicate_of[n] != n]
    assert result.duplicates == len(dropped)
    if distance == 4:
        assert dropped == [12, 13, 14, 19]
    stay = [f"{n:09d}" for n in range(len(images)) if n not in dropped]
    assert keys(tmp_path / "out") == stay
    assert result.selected is not None
    assert result.selected.samples == len(stay)
    assert (result.samples, result.plain) == (21, 4)
    assert result.unreadable == {"undecodable image": 1}
    assert "000000020" in result.first_unreadable[0]
    assert result.most_common_hash_samples == max(map(hashes.count, (hashes[n] for n in compared)))
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert [row["key"] for row in rows] == [f"{n:09d}" for n in dropped]
    for n, row in zip(dropped, rows, strict=True):
        original = duplicate_of[n]
        assert row["duplicate_of_key"] == f"{original:09d}"
        assert row["duplicate_of_shard"] == str(source / f"{original // 4:05d}.tar")
        assert row["shard"] == str(source / f"{n // 4:05d}.tar")
        assert row["hash"] == f"{hashes[n]:016x}"
        assert row["distance"] == (hashes[n] ^ hashes[original]).bit_count() <= distance


def test_against_sets(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "in", [encode(photo(n)) for n in (0, 1, 2, 1, 3)])
    plain = encode(Image.new("RGB", (9, 9), "red"))
    labelled = tmp_path / "set"
    write_shards(labelled / "train", [encode(photo(7)), encode(photo(1), "JPEG"), plain])
    write_shards(labelled / "test", [encode(photo(2, (96, 72)))])
    for split in ("train", "test"):
        (labelled / split / "nshards.txt").write_text("1\n")
    folder = write_shards(tmp_path / "folder", [encode(photo(8)), b"\x89PNG"])
    report = tmp_path / "report.parquet"
    result = dedup(
        UPath(source),
        None,
        against=(UPath(labelled), UPath(folder)),
        distance=4,
        report=UPath(report),
    )
    assert result.selected is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("folder", "in", "report.parquet", "set"),
    ]
    assert (result.samples, result.duplicates) == (5, 3)  # both of 1: not compared with itself
    overlaps = [(o.name, o.samples, o.found, o.not_compared) for o in result.against]
    assert overlaps == [(str(labelled), 4, 2, 1), (str(folder), 2, 0, 1)]
    rows = pq.read_table(report).to_pylist()
    assert [(row["key"], row["duplicate_of_key"]) for row in rows] == [
        ("000000001", "000000001"),
        ("000000002", "000000000"),
        ("000000003", "000000001"),
    ]
    assert {row["duplicate_of_shard"] for row in rows} == {
        str(labelled / "train/00000.tar"),
        str(labelled / "test/00000.tar"),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(source: Path, output: Path, workers: int = 1) -> DedupReport:
    return dedup(UPath(source), UPath(output), distance=4, workers=workers)


def test_killed_run_continues_and_a_finished_one_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_shards(tmp_path / "in", planted())
    expected = run(source, tmp_path / "out", workers=2)
    wanted = contents(tmp_path / "out")
    seen: list[bytes] = []

    def hash_or_stop(data: bytes) -> int:
        seen.append(data)
        if len(seen) == 7:
            raise KeyboardInterrupt
        return hash_image(data)

    monkeypatch.setattr("clip_data.perceptual_hash.hash_image", hash_or_stop)
    (tmp_path / "2").mkdir()
    output = tmp_path / "2/out"
    with pytest.raises(KeyboardInterrupt):
        run(source, output)
    assert not output.exists()
    run(source, output)
    assert len(seen) == 7 + len(planted()) - 4  # the first shard's were kept
    assert contents(output) == {
        name: data.replace(str(tmp_path / "out").encode(), str(output).encode())
        for name, data in wanted.items()
    }
    assert not (tmp_path / "2/out.hashes").exists()
    assert run(source, tmp_path / "out") == expected
    assert contents(tmp_path / "out") == wanted
    assert len(seen) == 7 + len(planted()) - 4


def test_remote_output_and_source(tmp_path: Path) -> None:
    local = write_shards(tmp_path / "in", planted())
    source, output = UPath("memory://dedup-in"), UPath("memory://dedup-out")
    for tar in local.iterdir():
        (source / tar.name).write_bytes(tar.read_bytes())
    result = dedup(source, output, distance=4, workers=1)
    assert result.duplicates == 3
    assert not UPath("memory://dedup-out.hashes").exists()
    assert (output / "00003.tar").exists() is False  # nothing of it stays
    assert dedup(source, output, distance=4, workers=1) == result


def test_refusals(tmp_path: Path) -> None:
    source = UPath(write_shards(tmp_path / "in", planted()))
    with pytest.raises(DataError, match="expected 0 to 16"):
        dedup(source, None, distance=17)
    with pytest.raises(DataError, match="expected the name of a"):
        dedup(source, None, report=UPath(tmp_path / "report.csv"))
    with pytest.raises(DataError, match="the output too"):
        dedup(source, source)
    with pytest.raises(DataError, match="one of the sets"):
        dedup(source, None, against=(source,))
    run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="of another source, or of another command"):
        dedup(source, UPath(tmp_path / "out"), distance=1)
    (tmp_path / "in/00000.tar").write_bytes((tmp_path / "in/00000.tar").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"00000\.tar: damaged"):
        dedup(source, None)
