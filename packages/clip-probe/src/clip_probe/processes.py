"""Several processes for one command: the first runs it, the others encode images for it.

Started by `accelerate launch -m clip_probe …` or torchrun. The command itself knows nothing of
them: its `encode` sends an order, each process encodes its share of the blocks into the feature
cache, and all say how it went. Orders and answers are JSON, in tensors over gloo.
"""

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

STOP = "stop"


def count() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


@contextmanager
def joined() -> Generator[None]:
    """Within it orders can be sent and received; the first process's end ends the others."""
    # hours may lie between two orders; when a process dies the launcher ends the rest
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield
    finally:
        if rank() == 0:
            send(None)
        dist.destroy_process_group()


def send(order: dict[str, Any] | None) -> None:
    """From the first process to all others; None lets them end."""
    _spread(json.dumps(order), source=0)


def receive() -> dict[str, Any] | None:
    """The next order."""
    return json.loads(_spread(None, source=0))


def exchange(answer: str) -> list[str]:
    """Every process's answer, in order."""
    return [
        _spread(answer if number == rank() else None, source=number) for number in range(count())
    ]


def _spread(text: str | None, source: int) -> str:
    """The `text` that the process `source` gives."""
    data = bytearray((text or "").encode())
    length = torch.tensor([len(data)])
    dist.broadcast(length, source)
    if not length:
        return ""
    letters = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(int(length))
    letters = letters.to(torch.uint8)
    dist.broadcast(letters, source)
    return bytes(letters.tolist()).decode()
