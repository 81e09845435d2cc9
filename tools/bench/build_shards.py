"""Images to shards: `clip_data.build` against webdataset's ShardWriter and against img2dataset.

uv run tools/bench/build_shards.py                              files, bytes kept; ShardWriter
uv run tools/bench/build_shards.py --peer shardwriter-checked   the same, each image decoded once
uv run tools/bench/build_shards.py --mode resize                to 256, encoded at quality 95
uv run tools/bench/build_shards.py --peer img2dataset --peer-env ENVROOT/img2dataset [--mode resize]

The images are 480 x 360 JPEGs with a photograph's spectrum, the captions as long as LAION's.
ShardWriter: the script that everyone writes, in one process; it reads a file and writes .jpg, .txt
and .json. Ours decodes every image as well, and writes index, outcomes, hashes and manifest; its
two workers start anew in each call. img2dataset needs an environment of its own (peers.sh) and
addresses: both sides download from one server on loopback, which takes its share of the two cores,
and are whole commands. Told are wall time, and img2dataset's rate by its own clock, without its
start-up of some seconds, against our whole command. TMPDIR says where the shards are written.
"""

# Our workers import this file when they start: what is heavy is imported where it is used.
import asyncio
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import click

SIZE, QUALITY = 256, 95
DIFFERENT = 256  # pictures; they take a while to make, and are used again and again
LETTERS = "eeettaaoinshrdlu"


class Setting(NamedTuple):
    """What is built, and how."""

    files: Path
    rows: list[dict[str, str]]
    """`image` and `caption` of each file, in order."""
    resize: bool
    workers: int

    @property
    def per_shard(self) -> int:
        """Rows of a shard, so that the workers have two each."""
        return math.ceil(len(self.rows) / (2 * self.workers))


def write_images(folder: Path, images: int) -> list[dict[str, str]]:
    """Files and their captions: a log-normal number of words with a mean of 10."""
    from preprocess import photo

    photos = [photo(480, 360, quality=90, seed=seed) for seed in range(min(images, DIFFERENT))]
    rows: list[dict[str, str]] = []
    noise = random.Random(0)
    for number in range(images):
        name = f"{number:06d}.jpg"
        (folder / name).write_bytes(photos[number % DIFFERENT])
        length = max(1, round(noise.lognormvariate(2.12, 0.6)))
        words = ("".join(noise.choices(LETTERS, k=noise.randint(2, 9))) for _ in range(length))
        rows.append({"image": name, "caption": f"{number} {' '.join(words)}"})
    return rows


def write_addresses(setting: Setting, table: Path) -> None:
    """A table of the files' addresses at a server of its own process, which ends with this one."""
    import pyarrow as pa
    from pyarrow import parquet

    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    spawn.Process(target=serve, args=(setting.files, sender), daemon=True).start()
    port = receiver.recv()
    urls = [f"http://127.0.0.1:{port}/{row['image']}" for row in setting.rows]
    captions = [row["caption"] for row in setting.rows]
    parquet.write_table(pa.table({"url": urls, "caption": captions}), table)


def serve(folder: Path, port: Connection) -> None:
    """Give every file of a folder from memory, at a free port of loopback."""
    from aiohttp import web

    files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}

    async def answer(request: web.BaseRequest) -> web.Response:
        if request.path in files:
            return web.Response(body=files[request.path], content_type="image/jpeg")
        return web.Response(status=404)  # robots.txt

    async def forever() -> None:
        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(forever())


# The sides ----------------------------------------------------------------------------------------


def build_here(setting: Setting, source: Path, output: Path) -> None:
    """Ours, in this process and its workers."""
    from clip_data import ImageOptions, build

    resized = ImageOptions(image_size=SIZE, encode="jpg", quality=QUALITY)
    build(
        source,
        output,
        images=resized if setting.resize else ImageOptions(),
        samples_per_shard=setting.per_shard,
        workers=setting.workers,
    )


def build_command(setting: Setting, source: Path, output: Path) -> None:
    """Ours, as a command."""
    command = [Path(sys.executable).with_name("clip-data"), "build", source, output]
    command += ["--samples-per-shard", str(setting.per_shard), "--workers", str(setting.workers)]
    if setting.resize:
        command += ["--image-size", str(SIZE), "--encode", "jpg", "--quality", str(QUALITY)]
    _run(command)


def shard_writer(setting: Setting, checked: bool, output: Path) -> None:
    """Theirs: one loop around webdataset's ShardWriter."""
    from PIL import Image
    from webdataset import ShardWriter

    pattern = str(output / "%05d.tar")
    output.mkdir()
    with ShardWriter(pattern, maxcount=setting.per_shard, verbose=0) as writer:
        for number, row in enumerate(setting.rows):
            data = (setting.files / row["image"]).read_bytes()
            if setting.resize:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                scale = SIZE / min(image.size)
                width, height = (round(side * scale) for side in image.size)
                buffer = io.BytesIO()
                image.resize((width, height)).save(buffer, "JPEG", quality=QUALITY)
                data = buffer.getvalue()
            elif checked:
                Image.open(io.BytesIO(data)).load()
            sample = {"__key__": f"{number:09d}", "jpg": data, "txt": row["caption"], "json": row}
            writer.write(sample)


def img2dataset(
    setting: Setting, environment: Path, threads: int, source: Path, seconds: list[float], out: Path
) -> None:
    """Theirs, as a command; its own clock goes to `seconds`."""
    how = ["--resize_mode=no", "--disable_all_reencoding=True"]
    if setting.resize:
        how = ["--resize_mode=keep_ratio", f"--image_size={SIZE}", f"--encode_quality={QUALITY}"]
    command = [
        environment / "bin" / "img2dataset", f"--url_list={source}", "--input_format=parquet",
        "--url_col=url", "--caption_col=caption", "--output_format=webdataset",
        f"--output_folder={out}", f"--number_sample_per_shard={setting.per_shard}",
        f"--processes_count={setting.workers}", f"--thread_count={threads}",
        "--enable_wandb=False", *how,
    ]  # fmt: skip
    _run(command, WANDB_MODE="disabled", NO_ALBUMENTATIONS_UPDATE="1")
    stats = [json.loads(path.read_bytes()) for path in out.glob("*_stats.json")]
    seconds.append(max(s["end_time"] for s in stats) - min(s["start_time"] for s in stats))


def _run(command: list[Any], **variables: str) -> None:
    result = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True
    )
    if result.returncode:
        raise click.ClickException(f"{command[0]}: {result.stdout[-2000:]}{result.stderr[-2000:]}")


# Their results ------------------------------------------------------------------------------------


def read_shards(folder: Path) -> dict[str, bytes]:
    """The image of each caption; captions are all different."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for _, run in groupby(tar, key=lambda member: member.name.split(".")[0]):
                members = {m.name.split(".")[1]: tar.extractfile(m).read() for m in run}
                found[members["txt"].decode()] = members["jpg"]
    return found


def check(setting: Setting, results: dict[str, dict[str, bytes]]) -> None:
    """Every side has every image: the bytes of the file, or much the same pixels at 256."""
    import numpy as np
    from PIL import Image

    expected = {r["caption"]: (setting.files / r["image"]).read_bytes() for r in setting.rows}
    first = next(iter(results.values()))
    for name, found in results.items():
        if found.keys() != expected.keys():
            raise click.ClickException(f"{name}: {len(found)} samples of {len(expected)}")
        if not setting.resize:
            if found != expected:
                raise click.ClickException(f"{name}: the bytes are not the files'")
            continue
        for caption in list(expected)[:16]:
            ours, theirs = (Image.open(io.BytesIO(s[caption])) for s in (first, found))
            if min(theirs.size) != SIZE or ours.size != theirs.size:
                raise click.ClickException(f"{name}: {theirs.size} pixels, not {ours.size}")
            off = np.abs(np.asarray(ours, np.float32) - np.asarray(theirs, np.float32)).mean()
            if off > 6:
                raise click.ClickException(f"{name}: pixels differ by {off:.1f} on average")


def compare_sides(
    setting: Setting, sides: dict[str, Callable[[Path], None]], work: Path, rounds: int
) -> dict[str, Any]:
    """Check the sides' results, then time them; each call starts with no output."""
    from interleaved import compare

    def fresh(name: str) -> Path:
        output = work / "".join(c if c.isalnum() else "-" for c in name)
        shutil.rmtree(output, ignore_errors=True)
        return output

    results: dict[str, dict[str, bytes]] = {}
    for name, side in sides.items():
        side(output := fresh(name))
        results[name] = read_shards(output)
    check(setting, results)
    del results
    return compare(
        {name: lambda n=name, s=side: s(fresh(n)) for name, side in sides.items()},
        rounds=rounds,
        warmup=0,  # the calls above
        work=len(setting.rows),
        unit="images",
        arguments=dict(click.get_current_context().params),
    )


@click.command()
@click.option("--images", default=4000, show_default=True, help="Files, in four shards.")
@click.option(
    "--mode",
    type=click.Choice(["keep", "resize"]),
    default="keep",
    show_default=True,
    help="The files' bytes, or the shorter side to 256 and JPEG at quality 95.",
)
@click.option(
    "--peer",
    type=click.Choice(["shardwriter", "shardwriter-checked", "img2dataset"]),
    default="shardwriter",
    show_default=True,
    help="checked: loads each image with Pillow before its bytes are kept.",
)
@click.option("--peer-env", metavar="DIR", help="img2dataset's environment, made by peers.sh.")
@click.option("--peer-threads", default=32, show_default=True, help="Of img2dataset's process.")
@click.option("--workers", default=2, show_default=True, help="Processes; ShardWriter has one.")
@click.option("--rounds", default=5, show_default=True, help="Timed calls of each side.")
def main(
    images: int, mode: str, peer: str, peer_env: str | None, peer_threads: int,
    workers: int, rounds: int,
) -> None:  # fmt: skip
    """Time the building of shards, once all sides give the same samples."""
    if (peer == "img2dataset") != (peer_env is not None):
        raise click.UsageError("--peer img2dataset and --peer-env go together")
    if (mode, peer) == ("resize", "shardwriter-checked"):
        raise click.UsageError("who resizes decodes anyway: take --peer shardwriter")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (files := work / "files").mkdir()
        setting = Setting(files, write_images(files, images), mode == "resize", workers)
        table, addresses = files / "table.jsonl", work / "addresses.parquet"
        table.write_text("".join(json.dumps(row) + "\n" for row in setting.rows))
        own_clock: list[float] = []
        if peer_env is None:
            checked = peer == "shardwriter-checked"
            sides = {
                "ours": partial(build_here, setting, table),
                peer: partial(shard_writer, setting, checked),
            }
        else:
            write_addresses(setting, addresses)
            theirs = partial(img2dataset, setting, Path(peer_env), peer_threads, addresses)
            sides = {
                "ours": partial(build_command, setting, addresses),
                peer: partial(theirs, own_clock),
                "ours, from files": partial(build_command, setting, table),
            }
        report = compare_sides(setting, sides, work, rounds)
        report["mean_bytes"] = mean((files / row["image"]).stat().st_size for row in setting.rows)
    if own_clock:  # the first was the check
        theirs, ours = median(own_clock[1:]), report["sides"]["ours"]["median"]
        report["own_clock"] = {"seconds": theirs, "rate": images / theirs, "ratio": theirs / ours}
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
