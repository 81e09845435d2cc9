"""An index directory on disk.

INDEX/image.index       FAISS
INDEX/embeddings.npy    float16, a row per picture, for exact scores
INDEX/metadata.arrow    key, caption, json and place in the shards, a row per picture
INDEX/index.json        what it was made from, the plan, the recall measured, the files' sizes
"""

import json
from pathlib import Path
from typing import Any

from clip_retrieval.errors import RetrievalError

FORMAT = 1
FILES = ("image.index", "embeddings.npy", "metadata.arrow")


def write_facts(path: Path, facts: dict[str, Any]) -> None:
    """Write index.json beside the other files; it records their sizes."""
    sizes = {name: (path / name).stat().st_size for name in FILES}
    text = json.dumps({"format": FORMAT} | facts | {"bytes": sizes}, indent=1)
    (path / "index.json").write_text(text + "\n", encoding="utf-8")


def read_facts(path: Path) -> dict[str, Any]:
    """The contents of index.json, once every file is found to be there and whole.

    Raises:
        RetrievalError: no index, a newer one, or one with a missing or truncated file.
    """
    file = path / "index.json"
    if not file.is_file():
        raise RetrievalError(
            f"{path} is no index (no index.json); make one with "
            f"`clip-retrieval build-index MODEL SHARDS {path}`"
        )
    try:
        facts: dict[str, Any] = json.loads(file.read_bytes())
    except ValueError as error:
        raise RetrievalError(f"{file} is not JSON ({error}); build the index again") from error
    if facts.get("format") != FORMAT:
        raise RetrievalError(
            f"{file}: format {facts.get('format')}, expected {FORMAT}; build the index again"
        )
    for name in FILES:
        found = (path / name).stat().st_size if (path / name).is_file() else "no file"
        if found != (expected := facts["bytes"][name]):
            raise RetrievalError(
                f"{path / name}: {found}, expected {expected} bytes; build the index again"
            )
    return facts
