"""Models on the Hugging Face hub, through its cache: only the files that a conversion reads."""

import re
from pathlib import Path

from clip_models.convert_files import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    shard_names,
)
from clip_models.errors import ModelError

_SMALL = [
    OPEN_CLIP_CONFIG,
    *("config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
]


def hub_name(source: str) -> str | None:
    """The `org/name` that `hf-hub:org/name` or `org/name` stands for; None: no hub id."""
    name = source.removeprefix("hf-hub:")
    return name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) else None


def fetch(name: str) -> Path:
    """A snapshot directory of a hub's model, with its configuration, tokenizer and weights.

    What is in the hub's cache is not fetched again; with HF_HUB_OFFLINE=1 nothing is.

    Raises:
        ModelError: no such model, no way to the hub and nothing in the cache, or no weights there.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, IncompleteSnapshotError

    try:
        try:
            directory = Path(snapshot_download(name, allow_patterns=_SMALL))
        except IncompleteSnapshotError as error:  # offline; what is needed may be there
            directory = Path(error.snapshot_path)
        ours = (directory / OPEN_CLIP_CONFIG).is_file()
        for weights in OPEN_CLIP_WEIGHTS if ours else TRANSFORMERS_WEIGHTS:
            try:
                file = Path(hf_hub_download(name, weights, revision=directory.name))
            except EntryNotFoundError:
                continue
            for shard in shard_names(file):
                hf_hub_download(name, shard, revision=directory.name)
            return directory
    except (OSError, ValueError) as error:  # the hub's errors are these
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no local path {name}, and the hub's model of that name cannot be had: {reason}"
        ) from error
    wanted = OPEN_CLIP_WEIGHTS if ours else TRANSFORMERS_WEIGHTS
    raise ModelError(
        f"the hub's model {name} has no weights here (nor in its cache when offline); looked for "
        f"{', '.join(wanted)}"
    )
