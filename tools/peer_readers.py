"""Our shards as open_clip's trainer and CLIP_benchmark read them, img2dataset's as we do.

tools/bench/peers.sh ENVROOT && uv run tools/peer_readers.py ENVROOT

The peers pin libraries that do not fit our lock, so each runs in an environment of its own, which
peers.sh makes: their readers are called there by this very file, `peer_readers.py READER PATH`, and
print what they have read. One line for each check; exit 1 if any finds a difference.
"""

import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

PICTURES = 30  # six batches of 5: open_clip's last one is whole, and repeats nothing
Pixel = tuple[int, ...]


def colour(image: Image.Image) -> Pixel:
    """What is known of a picture: one pixel."""
    return image.convert("RGB").getpixel((0, 0))


# The peers' readers, in their environments --------------------------------------------------------


def open_clip(shards: str) -> tuple[list[Any], Any]:
    """Colour and caption of each sample in an epoch of open_clip's trainer; their number."""
    from open_clip_train.data import get_wds_dataset

    arguments = SimpleNamespace(
        train_data=f"{shards}/{{00000..00004}}.tar", train_num_samples=None, seed=0, batch_size=5,
        workers=0, world_size=1, dataset_resampled=False, train_data_upsampling_factors=None,
    )  # fmt: skip
    loader = get_wds_dataset(arguments, colour, True, tokenizer=lambda text: [text]).dataloader
    samples = [pair for images, texts in loader for pair in zip(images, texts, strict=True)]
    return samples, loader.num_samples


def clip_benchmark(folder: str) -> tuple[list[Any], Any]:
    """Colour and label or captions of each sample; the class names and templates."""
    from clip_benchmark.datasets.builder import build_dataset

    task = "zeroshot_" + ("retrieval" if "retrieval" in folder else "classification")
    dataset = build_dataset("wds/set", root=folder, transform=colour, split="test", task=task)
    return list(dataset), [dataset.classes, dataset.templates]


READERS = {reader.__name__: reader for reader in (open_clip, clip_benchmark)}


# The checks ---------------------------------------------------------------------------------------


def main(environments: Path) -> bool:
    """Run all checks; whether nothing differs."""
    peer = environments / "clip-benchmark/bin/python"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pictures, classes = write_pictures(work / "pictures"), write_classes(work / "classes")
        clip_data("build", work / "pictures", work / "shards", "--samples-per-shard", "6")
        clip_data("build", work / "pictures", work / "retrieval", "--split", "test")
        clip_data("build", work / "classes", work / "set", "--split", "test")
        listed = [(pixel, [caption]) for pixel, caption in pictures]
        names = [["cat", "dog"], ["a photo of a {c}."]]
        return all([
            read(peer, "open_clip", work / "shards", pictures, PICTURES),
            read(peer, "clip_benchmark", work / "set", classes, names),
            read(peer, "clip_benchmark", work / "retrieval", listed, [None, None]),
            *accept(environments / "img2dataset/bin/img2dataset", work),
        ])  # fmt: skip


def write_pictures(folder: Path) -> list[tuple[Pixel, str]]:
    """Pictures of the three formats with captions; what a reader is to find, sorted."""
    folder.mkdir()
    found: list[tuple[Pixel, str]] = []
    for number in range(PICTURES):
        path = folder / f"{number:02d}.{('png', 'jpg', 'webp')[number % 3]}"
        Image.new("RGB", (20, 16), (number * 8, 250 - number * 8, 99)).save(path)
        path.with_suffix(".txt").write_text(f"Bild {number}: größer, 絵, 🙂")
        found.append((colour(Image.open(path)), path.with_suffix(".txt").read_text()))
    return sorted(found)


def write_classes(folder: Path) -> list[tuple[Pixel, int]]:
    """A folder of pictures for each of two classes; what a reader is to find, sorted."""
    for name, count in {"dog": 4, "cat": 7}.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, len(name), count)).save(
                folder / f"{name}/{number}.png"
            )
    return sorted([((n, 3, 4), 1) for n in range(4)] + [((n, 3, 7), 0) for n in range(7)])


def read(python: Path, reader: str, path: Path, samples: list[Any], about: Any) -> bool:
    """Whether a peer's reader finds the samples, in whatever order, and what is said about them."""
    command = [python, __file__, reader, path]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found, said = json.loads(result.stdout.splitlines()[-1])
    expected = json.loads(json.dumps(samples))  # tuples become lists
    same = tell(f"{reader} reads {path.name}", sorted(found), expected)
    return tell(f"{reader} knows {path.name}", said, about) and same


def accept(img2dataset: Path, work: Path) -> list[bool]:
    """Whether our commands take what img2dataset has written, failed rows included."""
    rows = write_photos(work / "photos")
    with served(work / "photos") as address:
        table = work / "list.jsonl"
        listed = [row | {"url": f"{address}/{row['url']}"} for row in rows]
        table.write_text("".join(json.dumps(row) + "\n" for row in listed))
        subprocess.run([
            img2dataset, f"--url_list={table}", "--input_format=jsonl", "--url_col=url",
            "--caption_col=caption", "--save_additional_columns=['similarity']",
            "--output_format=webdataset", f"--output_folder={work / 'theirs'}",
            "--number_sample_per_shard=10", "--processes_count=1", "--thread_count=4",
            "--resize_mode=no", "--disable_all_reencoding=True", "--enable_wandb=False",
        ], env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}, check=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)  # fmt: skip
    theirs = work / "theirs"
    good = sorted(row["caption"] for row in rows if not row["url"].startswith("none"))
    similar = sorted(row["caption"] for row in rows[2:] if row["similarity"] > 0.3)
    clip_data("filter", theirs, work / "similar", "--where", "similarity > 0.3")
    clip_data("subset", theirs, work / "subset", "--samples", "9")
    clip_data("build", theirs, work / "resharded", "--samples-per-shard", "100")
    files = {path.name: path.read_bytes() for path in (work / "photos").iterdir()}
    images = read_tars(work / "resharded", "jpg")
    return [
        tell("verify takes img2dataset's", clip_data("verify", theirs)["samples"], len(good)),
        tell("inspect takes img2dataset's", clip_data("inspect", theirs)["samples"], len(good)),
        tell("filter takes img2dataset's", read_tars(work / "similar", "txt"), similar),
        tell("subset takes img2dataset's", len(read_tars(work / "subset", "txt")), 9),
        tell("build takes img2dataset's", read_tars(work / "resharded", "txt"), good),
        tell("build keeps img2dataset's bytes", images, sorted(files.values())),
        *(
            tell(f"verify finds no fault: {name}", clip_data("verify", work / name)["faults"], {})
            for name in ("theirs", "shards", "set", "retrieval", "similar", "subset", "resharded")
        ),
    ]


def write_photos(folder: Path) -> list[dict[str, Any]]:
    """JPEGs of noise, and a list of them whose first two addresses lead nowhere."""
    folder.mkdir()
    noise = random.Random(0)
    rows = [{"url": f"none{n}.jpg", "caption": f"none {n}", "similarity": 0.9} for n in range(2)]
    for number in range(PICTURES):
        name = f"{number:02d}.jpg"
        Image.frombytes("RGB", (40, 30), noise.randbytes(3600)).save(folder / name)
        rows.append({"url": name, "caption": f"photo {number}", "similarity": number / 50})
    return rows


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of a folder, on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


def read_tars(folder: Path, extension: str) -> list[Any]:
    """The members of all tars with an extension, sorted; text as such."""
    found: list[Any] = []
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            data = [tar.extractfile(m).read() for m in tar if m.name.endswith("." + extension)]
        found += [item.decode() for item in data] if extension == "txt" else data
    return sorted(found)


def clip_data(*arguments: str | Path) -> dict[str, Any]:
    """What a command of ours reports."""
    command = [Path(sys.executable).with_name("clip-data"), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE)
    if not result.stdout:  # verify reports its faults, and exits with 1
        result.check_returncode()
    return json.loads(result.stdout)


def tell(what: str, found: Any, expected: Any) -> bool:
    """Print what a check has found: how many, of a long list."""
    brief = f"{len(found)} of them" if isinstance(found, list) and len(found) > 2 else found
    print(f"{'OK' if found == expected else 'DIFFERS':9}{what}: {brief}")
    return found == expected


if __name__ == "__main__":
    if sys.argv[1] in READERS:
        print(json.dumps(READERS[sys.argv[1]](sys.argv[2])))
    else:
        sys.exit(not main(Path(sys.argv[1])))
