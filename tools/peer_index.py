"""Our embeddings as autofaiss and clip-retrieval read them, clip-retrieval's as we do.

tools/bench/peers.sh ENVROOT clip-retrieval && uv run tools/peer_index.py ENVROOT

The peers run in an environment of their own (peers.sh), where this very file is called:
`peer_index.py index EMBEDDINGS OUT` and `peer_index.py write OUT`. One line for each check; exit 1
if any finds a difference.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PARTS, ROWS, DIM = 3, 400, 32


# In the peers' environment ------------------------------------------------------------------------


def module(name: str) -> Any:
    """A module of clip-retrieval by its file: the package itself imports its whole server."""
    import importlib.metadata
    import importlib.util

    files = importlib.metadata.files("clip-retrieval") or []
    path = next(file for file in files if file.name == name).locate()
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def index(embeddings: str, out: str) -> dict[str, Any]:
    """Index by `clip-retrieval index`, which is autofaiss; the rows found and the metadata."""
    import faiss
    import pandas as pd

    Path(out).mkdir()
    module("clip_index.py").clip_index(
        *(embeddings, out),
        max_index_memory_usage="1G",
        current_memory_available="2G",
        nb_cores=1,
    )
    found: dict[str, Any] = {}
    for kind, folder in (("image", "img_emb"), ("text", "text_emb")):
        files = sorted(Path(embeddings, folder).glob("*.npy"))
        rows = np.concatenate([np.load(file) for file in files]).astype(np.float32)
        found[kind] = faiss.read_index(f"{out}/{kind}.index").search(rows, 1)[1].ravel().tolist()
    tables = [pd.read_parquet(file) for file in sorted(Path(out, "metadata").glob("*.parquet"))]
    table = pd.concat(tables)
    return found | {name: table[name].tolist() for name in ("image_path", "caption")}


def write(out: str) -> None:
    """A folder by clip-retrieval's own writer."""
    writer = module("writer.py")
    for part in range(PARTS):
        sink = writer.NumpyWriter(part, out, True, True, True, PARTS)
        names, captions, told, rows = made(part)
        sink({
            "image_embs": rows, "text_embs": rows[::-1], "image_filename": names,
            "text": captions, "metadata": told,
        })  # fmt: skip
        sink.flush()


def made(part: int) -> tuple[list[str], list[str], list[str], np.ndarray]:
    """Names, captions, metadata and float16 unit rows of a part."""
    rows = np.random.default_rng(part).standard_normal((ROWS, DIM))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    names = [f"{part}/{row}.jpg" for row in range(ROWS)]
    told = [json.dumps({"url": f"http://x/{name}", "width": 9}) for name in names]
    return names, [f"picture {name}" for name in names], told, rows


# Here ---------------------------------------------------------------------------------------------


def main(environments: Path) -> bool:
    """Make small data, let each side read the other's; whether everything was as expected."""
    from clip_models import CLIP, Preprocess, architecture, save_model
    from clip_retrieval import Index, build_index, embed_source

    peer = environments / "clip-retrieval/bin/python"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        save_model(work / "model", CLIP(architecture("XS")), Preprocess(32))
        captions = pictures(work / "pictures")
        embed_source(work / "model", work / "pictures", work / "ours", workers=0)
        told = call(peer, "index", work / "ours", work / "theirs")
        call(peer, "write", work / "written")
        build_index(None, work / "written", work / "index")
        opened, rows = Index(work / "index"), np.concatenate([made(p)[3] for p in range(PARTS)])
        found = opened.search(rows.astype(np.float32), 1)
        row = opened.row(ROWS + 7)
        return all([
            tell("autofaiss finds our pictures", told["image"], list(range(len(captions)))),
            tell("autofaiss finds our captions", told["text"], list(range(len(captions)))),
            tell("clip-retrieval reads our keys", told["image_path"], [n for n, _ in captions]),
            tell("clip-retrieval reads our captions", told["caption"], [c for _, c in captions]),
            tell("we read its rows", [m[0].row for m in found], list(range(PARTS * ROWS))),
            tell("we read its keys", row["key"], "1/7.jpg"),
            tell("we read its captions", row["caption"], "picture 1/7.jpg"),
            tell("we read its urls", row["url"], "http://x/1/7.jpg"),
            tell("we read its metadata", row["json"]["width"], 9),
        ])  # fmt: skip


def pictures(folder: Path) -> list[tuple[str, str]]:
    """Pictures of noise with captions; their names and these, in order."""
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    found = [(f"{number:02d}.png", f"picture {number}") for number in range(40)]
    for name, caption in found:
        pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption)
    return found


def call(python: Path, *arguments: str | Path) -> Any:
    """What this file prints in the peers' environment."""
    command = [python, __file__, *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def tell(what: str, found: Any, expected: Any) -> bool:
    """Print what a check has found: how many, of a long list."""
    brief = f"{len(found)} of them" if isinstance(found, list) and len(found) > 2 else found
    print(f"{'OK' if found == expected else 'DIFFERS':9}{what}: {brief}")
    return found == expected


if __name__ == "__main__":
    if sys.argv[1] in ("index", "write"):
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    else:
        sys.exit(not main(Path(sys.argv[1])))
