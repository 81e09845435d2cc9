"""CLIP_benchmark's sets on the Hugging Face hub, through its cache."""

import re
from pathlib import Path

from clip_probe.errors import ProbeError


def hub_name(source: str) -> str | None:
    """The hub's OWNER/NAME that `hf-hub:OWNER/NAME` or CLIP_benchmark's `wds/NAME` stands for."""
    if source.startswith("wds/"):
        return f"clip-benchmark/wds_{source.removeprefix('wds/').replace('/', '-')}"
    match = re.fullmatch(r"hf-hub:(\w[\w.-]*/[\w.-]+)", source)
    return match[1] if match else None


def fetch_split(name: str, split: str) -> Path:
    """A snapshot directory with one split of a set and its text files.

    What is in the hub's cache is not fetched again; with HF_HUB_OFFLINE=1 nothing is.

    Raises:
        ProbeError: no such set, or no way to the hub and nothing in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError

    try:
        wanted = ["*.txt", f"{split}/*"]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except IncompleteSnapshotError as error:  # offline; a shard that is missing is named later
        return Path(error.snapshot_path)
    except (OSError, ValueError) as error:  # the hub's errors are these
        reason = str(error).strip().splitlines()[0]
        raise ProbeError(f"the hub's set {name} cannot be had: {reason}") from error
