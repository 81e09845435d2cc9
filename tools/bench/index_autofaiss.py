"""`clip-retrieval build-index` beside autofaiss: build, bytes per vector, queries a second, recall.

    tools/bench/peers.sh ENVROOT clip-retrieval
    uv run tools/bench/index_autofaiss.py --peer-env ENVROOT/clip-retrieval

Vectors are made as CLIP's are: unit rows in clusters, of low rank within them, all in one cone;
texts lie apart from them, by one offset and some noise. Both sides build from one folder of
float16 embeddings, in processes of their own, watched from outside. Then this process asks both
the same new texts: autofaiss's index as it returned it, and tuned to the recall that ours has.

Bytes per vector are told twice: in memory, of what the search walks through, and on the disk, with
the float16 rows, memory-mapped, that our hits are scored again from. Peaks of memory are of pages
that no file backs, which the plan is about, and of those that a file does.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from clip_retrieval.index import Searcher
from clip_retrieval.search import Index
from clip_retrieval.tune import smallest
from clip_retrieval.vectors import exact_search, unit_rows
from interleaved import compare

import faiss  # isort: skip

PART = 100_000
BUILD = "import sys, autofaiss; autofaiss.build_index(sys.argv[1], index_path=sys.argv[2], "
BUILD += "index_infos_path=sys.argv[2] + '.json', verbose=30, nb_cores=int(sys.argv[3]), "
BUILD += "max_index_memory_usage='16G', current_memory_available='20G')"
_MEMORY = {"anonymous": "RssAnon", "file-backed": "RssFile"}


def main() -> None:
    """Print one report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-env", type=Path, help="autofaiss's; without it ours alone is told")
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compact", default="rabitq", help="family of the compact setting")
    parser.add_argument("--work", type=Path, help="keep what is built there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        print(json.dumps(run(arguments, work), indent=1))


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Build all sides, check them and time them."""
    faiss.omp_set_num_threads(arguments.threads)
    embeddings, queries_QD = make(work, arguments.rows, arguments.dim, arguments.queries)
    make(work / "tiny", 1_000, arguments.dim, 10)
    tiny = ours(work / "tiny" / "embeddings", work / "tiny" / "index", arguments)
    idle = tiny["peak_bytes"]["anonymous"]
    built = {"ours": ours(embeddings, work / "index", arguments)}
    built["compact"] = ours(embeddings, work / "compact", arguments, arguments.compact)
    for name in ("ours", "compact"):
        peak = built[name]["peak_bytes"]["anonymous"] - idle
        planned = built[name]["plan"]["build_bytes"]
        built[name]["memory"] = {"planned": planned, "measured": peak, "ratio": planned / peak}
    index, compact = Index(work / "index"), Index(work / "compact")
    rows_N = np.arange(len(index))
    tenth_Q = exact_search(index.rows, queries_QD, 10, rows_N)[1][:, -1:]

    def recall(rows_QK: np.ndarray) -> float:
        # by our scores for either side: theirs are of the rows as they are stored
        scores = np.einsum("qd,qkd->qk", queries_QD, index.rows.unit(np.maximum(rows_QK, 0)))
        return float((np.where(rows_QK >= 0, scores, -1) >= tenth_Q - 1e-6).mean())

    sides: dict[str, Any] = {}
    for name, opened in (("ours", index), ("compact", compact)):
        sides[name] = searching(opened, queries_QD)
    if arguments.peer_env:
        peer = autofaiss(embeddings, work / "autofaiss.index", arguments)
        graph = faiss.read_index(str(work / "autofaiss.index"))
        built["autofaiss"] = peer
        sides["autofaiss"] = lambda: graph.search(queries_QD, 10)
        tuned = at_recall(graph, queries_QD, recall, recall(sides["ours"]()[0]))
        built["autofaiss"]["parameters"] = {"as returned": parameter(graph), "tuned": tuned}
        sides["autofaiss tuned"] = lambda: graph.search(queries_QD, 10, params=searching_at(tuned))
    recalls: dict[str, float] = {}
    for name, side in sides.items():
        recalls[name] = recall(side()[1] if "autofaiss" in name else side()[0])
    wanted = {name for name in recalls if name not in ("compact", "autofaiss tuned")}
    if min(recalls[name] for name in wanted) < 0.9:
        sys.exit(f"the indexes do not answer alike: recall@10 {recalls}")

    report: dict[str, Any] = {"built": built, "recall@10": recalls}
    counted = {"work": arguments.queries, "unit": "queries", "rounds": arguments.rounds}
    told = {name: str(value) for name, value in vars(arguments).items()}
    for peer in [name for name in sides if name != "ours"]:
        pair = {"ours": sides["ours"], peer: sides[peer]}
        report[f"ours / {peer}"] = compare(pair, arguments=told, **counted)
    if arguments.peer_env:
        theirs = built["autofaiss"]["bytes_per_vector"]
        report["bytes of theirs"] = {
            name: {where: each / theirs[where] for where, each in own["bytes_per_vector"].items()}
            for name, own in built.items()
        }
        seconds = built["autofaiss"]["seconds"]
        report["build"] = {"theirs / ours": seconds / built["ours"]["seconds"]}
    return report


def searching(index: Index, queries_QD: np.ndarray) -> Any:
    """A search as the tool does it, exact scores included, without metadata."""
    searcher: Searcher = index.searcher
    return lambda: searcher.search(queries_QD, 10, index.knob)


def at_recall(graph: Any, queries_QD: np.ndarray, recall: Any, target: float) -> int:
    """The least efSearch (or nprobe) of their index that has our recall."""

    def reached(value: int) -> bool:
        return recall(graph.search(queries_QD, 10, params=searching_at(value, graph))[1]) >= target

    return smallest(reached, 4096)


def searching_at(value: int, graph: Any = None) -> Any:
    """FAISS's parameters for their index; autofaiss makes a graph for all but the largest sets."""
    if graph is not None and not isinstance(graph, faiss.IndexHNSW):
        sys.exit(f"autofaiss chose {type(graph).__name__}, no graph; nothing to tune here")
    return faiss.SearchParametersHNSW(efSearch=value)


def parameter(graph: Any) -> int:
    """The efSearch that autofaiss has set."""
    searching_at(1, graph)
    return graph.hnsw.efSearch


def ours(
    embeddings: Path, index: Path, arguments: argparse.Namespace, family: str | None = None
) -> dict[str, Any]:
    """Build by the command; its report, seconds and peak of memory."""
    command = [Path(sys.executable).with_name("clip-retrieval"), "build-index", embeddings, index]
    if family:
        command += ["--family", family]
    told, seconds, peak = watched(command, arguments.threads)
    built = json.loads(told)
    codes = built["bytes"]["image.index"] / built["images"]
    rows = built["bytes"]["rows.index"] / built["images"]
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "bytes_per_vector": {"in memory": codes, "on disk": codes + rows},
        "recall@10, its own": built["recall@10"],
        "plan": built["plan"],
        "search": built["search"],
    }


def autofaiss(embeddings: Path, index: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Build by autofaiss's automatic choice; seconds, peak of memory, bytes."""
    python = arguments.peer_env / "bin/python"
    command = [python, "-c", BUILD, embeddings / "img_emb", index, str(arguments.threads)]
    _, seconds, peak = watched(command, arguments.threads)
    each = index.stat().st_size / arguments.rows  # it is searched as it is written
    both = {"in memory": each, "on disk": each}
    return {"seconds": seconds, "peak_bytes": peak, "bytes_per_vector": both}


def watched(command: list[Any], threads: int) -> tuple[str, float, dict[str, int]]:
    """Run a command; its output, its seconds, and the peaks of its memory."""
    environment = {"OMP_NUM_THREADS": str(threads), "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    print(*command, file=sys.stderr)
    start, peak = time.perf_counter(), dict.fromkeys(_MEMORY, 0)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=sys.stderr, env=environment
        )
        while process.poll() is None:
            now = resident(process.pid)
            peak = {kind: max(most, now[kind]) for kind, most in peak.items()}
            time.sleep(0.02)
        if process.returncode:
            sys.exit(f"exit {process.returncode}: {command[0]}")
        seconds = time.perf_counter() - start
        output.seek(0)
        return output.read(), seconds, peak


def resident(process: int) -> dict[str, int]:
    """Bytes of a process's memory: pages that no file backs, and pages of files."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        status = ""
    told = dict(line.split(":", 1) for line in status.splitlines())
    return {kind: int(told.get(name, "0").split()[0]) * 1024 for kind, name in _MEMORY.items()}


def make(work: Path, rows: int, dim: int, queries: int) -> tuple[Path, np.ndarray]:
    """A folder of embeddings, pictures and texts, and texts of other pictures as queries."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, dim + 1, dtype=np.float32) ** -0.5
    spectrum /= np.linalg.norm(spectrum)
    basis = rng.standard_normal((dim, dim), np.float32) / np.sqrt(dim)

    def drawn(count: int) -> np.ndarray:  # of low rank: most of it in few directions
        return (rng.standard_normal((count, dim), np.float32) * spectrum) @ basis

    cone, offset = (unit_rows(rng.standard_normal((1, dim), np.float32)) for _ in range(2))
    centres = unit_rows(drawn(max(100, rows // 500)))

    def pair(count: int) -> tuple[np.ndarray, np.ndarray]:
        near = centres[rng.integers(len(centres), size=count)]
        images = unit_rows(0.6 * cone + 0.6 * near + 0.55 * np.sqrt(dim) * drawn(count) / dim**0.5)
        noise = rng.standard_normal((count, dim), np.float32) / np.sqrt(dim)
        return images, unit_rows(images + 0.8 * offset + 0.5 * noise)

    folder = work / "embeddings"
    width = len(str(-(-rows // PART)))
    for kind in ("img_emb", "text_emb"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, rows, PART)):
        for kind, values in zip(
            ("img_emb", "text_emb"), pair(min(PART, rows - start)), strict=True
        ):
            file = folder / kind / f"{kind}_{number:0{width}d}.npy"
            np.save(file, values.astype(np.float16))
    return folder, pair(queries)[1]


if __name__ == "__main__":
    main()
