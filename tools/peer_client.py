"""clip-retrieval's own client asks our server; CLIP_benchmark scores our embeddings as we do.

tools/bench/peers.sh ENVROOT clip-retrieval clip-benchmark
uv run tools/peer_client.py ENVROOT MODEL SPLIT

MODEL is a model directory, SPLIT a directory of captioned shards: run/model and sets/noto-names/all
of tools/quickstart.sh, say. Each peer runs in an environment of its own, where this very file,
`peer_client.py PEER FILE`, calls it and prints what it has found. One line for each check; exit 1
if any finds a difference.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path
from typing import Any

import numpy as np

K = (1, 5, 10)
TEXTS = ("a red heart", "a flag", "a smiling cat")
TOOL = Path(sys.executable).with_name("clip-retrieval")


# The peers, in their environments -----------------------------------------------------------------


def client(file: str) -> list[Any]:
    """Each question's hits, by ClipClient with its own defaults: duplicates removed, 40 hits."""
    asked = json.loads(Path(file).read_text())
    # by its file: `import clip_retrieval` wants flask, h5py and torch
    path = next(f for f in files("clip-retrieval") if f.name == "clip_client.py").locate()
    spec = importlib.util.spec_from_file_location("clip_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = module.ClipClient(url=f"{asked['address']}/knn-service", indice_name="peer")
    few = module.ClipClient(asked["address"] + "/knn-service", "peer", num_images=3)
    found = [own.query(text=text) for text in asked["texts"]]
    found += [few.query(image=asked["image"]), few.query(embedding_input=asked["vector"])]
    return found


def benchmark(file: str) -> dict[str, float]:
    """CLIP_benchmark's metrics of embeddings, by its own `evaluate`, in one batch."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    stored = {name: torch.from_numpy(value) for name, value in np.load(file).items()}
    texts, owner = stored["texts"], stored["owner"].tolist()
    captions = [[] for _ in stored["images"]]
    for number, image in enumerate(owner):
        captions[image].append(number)

    class Model:
        def encode_image(self, images: Any) -> Any:
            return images

        def encode_text(self, numbers: Any) -> Any:
            return texts[numbers]

    batches = [(stored["images"], captions)]
    return evaluate(Model(), batches, torch.tensor, "cpu", amp=False, recall_k_list=list(K))


PEERS = {peer.__name__: peer for peer in (client, benchmark)}


# The checks ---------------------------------------------------------------------------------------


def main(environments: Path, model: Path, directory: Path) -> bool:
    """Run all checks; whether nothing differs."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        return all([
            *client_checks(environments / "clip-retrieval/bin/python", model, directory, work),
            *benchmark_checks(environments / "clip-benchmark/bin/python", model, directory, work),
        ])  # fmt: skip


def client_checks(python: Path, model: Path, directory: Path, work: Path) -> list[bool]:
    """Whether the client finds by our server what our command finds."""
    from clip_retrieval import Index, build_index

    build_index(model, directory, work / "index")
    index = Index(work / "index")
    (work / "image.png").write_bytes(index.image(0))
    server = subprocess.Popen(
        [TOOL, "serve", f"peer={work / 'index'}", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        address = json.loads(server.stdout.readline())["address"]
        asked = {
            "address": address, "texts": TEXTS, "image": str(work / "image.png"),
            "vector": index.vector(1).tolist(),
        }  # fmt: skip
        (work / "asked.json").write_text(json.dumps(asked))
        found = run(python, "client", work / "asked.json")
    finally:
        server.terminate()
        code = server.wait(30)
    options = [option for text in TEXTS for option in ("--text", text)]
    options += ["--fold", "0.94", "-k", "40"]
    lines = subprocess.run([TOOL, "query", work / "index", *options], stdout=-1, check=True).stdout
    expected = [[hit["row"] for hit in json.loads(line)["hits"]] for line in lines.splitlines()]
    *by_text, by_image, by_vector = ([hit["id"] for hit in hits] for hits in found)
    keys = {"id", "similarity", "caption", "image_path"}
    return [
        tell("ClipClient: text, 40 hits each", by_text, expected),
        tell("ClipClient: a picture finds itself", by_image[0], 0),
        tell("ClipClient: a vector finds itself", by_vector[0], 1),
        tell(
            "ClipClient: hits without a field",
            sum(not keys <= h.keys() for f in found for h in f),
            0,
        ),
        tell("the server's exit", code, 0),
    ]


def benchmark_checks(python: Path, model: Path, directory: Path, work: Path) -> list[bool]:
    """Whether CLIP_benchmark gives our recall, to the last digit of its float32."""
    from clip_models import load_model
    from clip_retrieval.evaluate import embed_set, recall

    images, texts, owner, _ = embed_set(load_model(model), directory)
    ours = recall(images, texts, owner, K)["metrics"]
    np.savez(work / "set.npz", images=images, texts=texts, owner=owner)
    theirs = run(python, "benchmark", work / "set.npz")
    return [tell(name, float(np.float32(ours[name])), theirs[name]) for name in theirs]


def run(python: Path, peer: str, file: Path) -> Any:
    """What a peer prints, in its environment."""
    command = [python, __file__, peer, file]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def tell(what: str, found: Any, expected: Any) -> bool:
    """Print what a check has found: how many, of a long list."""
    brief = f"{len(found)} of them" if isinstance(found, list) else found
    print(f"{'OK' if found == expected else 'DIFFERS':9}{what}: {brief}")
    return found == expected


if __name__ == "__main__":
    if sys.argv[1] in PEERS:
        print(json.dumps(PEERS[sys.argv[1]](sys.argv[2])))
    else:
        sys.exit(not main(*map(Path, sys.argv[1:])))
