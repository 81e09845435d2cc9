"""`clip-retrieval serve` under load: 2,000 requests of 64 clients, its p99 and its memory.

uv run tools/bench/serve_load.py                   ViT-B-32 of random weights, 1,000 pictures
uv run tools/bench/serve_load.py --index INDEX     an index that is there

Three of five requests are texts, one is a picture and one a row; every answer is checked to be the
one the same question gets alone. Then the same again while other clients send what is malformed,
oversized or never ends, all of which must be refused. Memory is the server's resident set after
each quarter, by its own /metrics.
"""

import base64
import http.client
import io
import json
import random
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import clip_models
import numpy as np
import torch
from clip_models import CLIP, Preprocess, save_model
from clip_retrieval import build_index
from interleaved import machine
from PIL import Image

WORDS = ["red", "blue", "cat", "dog", "house", "tree", "river", "cloud", "stone", "light"]
TOOL = Path(sys.executable).with_name("clip-retrieval")
Question = dict[str, Any]


@click.command()
@click.option("--index", type=click.Path(path_type=Path), help="Index directory to serve.")
@click.option("--architecture", default="ViT-B-32", show_default=True, help="Else: the model,")
@click.option("--pictures", default=1000, show_default=True, help="and pictures of noise.")
@click.option("--requests", default=2000, show_default=True, help="Of all clients.")
@click.option("--clients", default=64, show_default=True, help="Connections at once.")
def main(index: Path | None, architecture: str, pictures: int, requests: int, clients: int) -> None:
    """Ask a server of its own process, and report what it took."""
    arguments = {k: v for k, v in click.get_current_context().params.items() if k != "index"}
    with tempfile.TemporaryDirectory() as folder:
        path = index or make_index(Path(folder), architecture, pictures)
        server = subprocess.Popen(
            [TOOL, "serve", f"load={path}", "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            address = json.loads(server.stdout.readline())["address"]
            report = measure(urlsplit(address).netloc, requests, clients)
        finally:
            server.terminate()
            code = server.wait(30)
    report |= {"exit": code, **machine(), "arguments": arguments}
    click.echo(json.dumps(report))
    if code or any(report[part]["wrong"] for part in ("quiet", "abused")):
        sys.exit("some answers were wrong; see above")


def make_index(folder: Path, architecture: str, pictures: int) -> Path:
    """A model of random weights and an index of noise."""
    torch.manual_seed(0)
    config = clip_models.architecture(architecture)
    save_model(folder / "model", CLIP(config), Preprocess(config.vision_cfg.image_size))
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards/00000.tar", "w") as tar:
        for number in range(pictures):
            for suffix, data in (("png", picture(number)), ("txt", f"noise {number}".encode())):
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_index(folder / "model", folder / "shards", folder / "index")
    return folder / "index"


def picture(seed: int) -> bytes:
    """Coarse noise, so that pictures differ after resizing."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((256, 256)).save(file, "PNG")
    return file.getvalue()


def measure(place: str, requests: int, clients: int) -> dict[str, Any]:
    """The load twice: alone, and beside clients that mean no good."""
    random.seed(0)
    kinds: list[Question] = [{"text": " ".join(random.choices(WORDS, k=5))} for _ in range(12)]
    kinds += [{"image": base64.b64encode(picture(10_000 + n)).decode()} for n in range(4)]
    kinds += [{"id": n} for n in range(4)]
    kinds = [{"num_images": 40, "deduplicate": True} | kind for kind in kinds]
    alone = [post(place, kind)[1] for kind in kinds]
    load(place, kinds, alone, requests // 4, clients)  # threads, pools and caches are there now
    report: dict[str, Any] = {"quiet": load(place, kinds, alone, requests, clients)}
    stop = threading.Event()
    with ThreadPoolExecutor(24) as pool:
        abusers = [pool.submit(abuse, place, number, stop) for number in range(24)]
        report["abused"] = load(place, kinds, alone, requests, clients)
        stop.set()
        refused = sum((future.result() for future in abusers), Counter[str]())
    report["refused"] = dict(sorted(refused.items()))
    report["memory_growth"] = report["abused"]["memory"][-1] / report["quiet"]["memory"][0]
    return report


def load(
    place: str, kinds: list[Question], alone: list[Any], requests: int, clients: int
) -> dict[str, Any]:
    """Milliseconds a request takes, answers that are not as they were alone, memory in MB."""
    seconds, wrong, memory = list[float](), Counter[str](), [resident(place)]
    numbers, start = iter(range(requests)), time.perf_counter()
    lock = threading.Lock()

    def client() -> None:
        connection = http.client.HTTPConnection(place, timeout=120)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                connection.close()
                return
            kind = number % len(kinds)
            began = time.perf_counter()
            status, found = post(place, kinds[kind], connection)
            took = time.perf_counter() - began
            with lock:
                seconds.append(took)
                if status != 200 or not same(found, alone[kind]):
                    wrong[str(status)] += 1
                if len(seconds) % (requests // 4) == 0:
                    memory.append(resident(place))

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client) for _ in range(clients)]:
            future.result()
    took = time.perf_counter() - start
    p50, p99, most = (1000 * float(np.quantile(seconds, q)) for q in (0.5, 0.99, 1))
    return {
        "requests": len(seconds),
        "wrong": dict(wrong),
        "per_second": len(seconds) / took,
        "milliseconds": {"p50": p50, "p99": p99, "max": most},
        "memory": memory,
    }


def same(found: Any, expected: Any) -> bool:
    """The same similarities: a batch's last digits, and so the order of equals, may differ."""
    pairs = zip(found, expected, strict=False)
    close = all(abs(a["similarity"] - b["similarity"]) < 1e-4 for a, b in pairs)
    return len(found) == len(expected) and close


def post(
    place: str, question: Question, connection: http.client.HTTPConnection | None = None
) -> tuple[int, Any]:
    """Status and answer."""
    own = connection or http.client.HTTPConnection(place, timeout=120)
    own.request("POST", "/knn-service", json.dumps(question))
    answer = own.getresponse()
    found = json.loads(answer.read())
    if connection is None:
        own.close()
    return answer.status, found


def resident(place: str) -> float:
    """MB of the server's resident memory."""
    connection = http.client.HTTPConnection(place, timeout=120)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    lines = (line.split() for line in text.splitlines())
    return next(float(f[1]) for f in lines if f[0] == "process_resident_memory_bytes") / 1e6


def abuse(place: str, number: int, stop: threading.Event) -> Counter[str]:
    """Bad requests of one kind until told to stop; the statuses they got."""
    seen = Counter[str]()
    while not stop.is_set():
        if number % 3 == 0:
            bodies = [b"{", b"[" * 50_000, b'{"image": "%s"}' % base64.b64encode(b"\x89PNG" * 99)]
            seen[f"malformed {raw(place, random.choice(bodies))}"] += 1
        elif number % 3 == 1:
            seen[f"oversized {raw(place, b'x' * 20_000_000)}"] += 1
        else:
            seen[f"slow {slow(place, stop)}"] += 1
    return seen


def raw(place: str, body: bytes) -> str:
    """The status of a body that is no question."""
    connection = http.client.HTTPConnection(place, timeout=120)
    try:
        connection.request("POST", "/knn-service", body)
        return str(connection.getresponse().status)
    except OSError as error:  # refused before all of it was sent
        return type(error).__name__
    finally:
        connection.close()


def slow(place: str, stop: threading.Event) -> str:
    """The status of a body of which a byte arrives now and then."""
    host, port = place.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /knn-service HTTP/1.1\r\nHost: {place}\r\nContent-Length: 999\r\n\r\n"
        connection.sendall(head.encode())
        connection.settimeout(0.5)
        for _ in range(60):
            if stop.is_set():
                return "stopped"
            try:
                connection.sendall(b" ")
                return connection.recv(100).decode().split()[1]
            except TimeoutError:
                continue
    return "not refused"


if __name__ == "__main__":
    main()
