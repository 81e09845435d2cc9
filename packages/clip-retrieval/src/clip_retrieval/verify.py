"""What an index is, and whether its files agree with each other."""

# N rows, D embedding width

from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.errors import RetrievalError
from clip_retrieval.layout import generation, read_facts
from clip_retrieval.search import Index
from clip_retrieval.vectors import BLOCK_ROWS, Float32, check_unit

_ASKED = 1_000  # rows that must find themselves
_FOUND = 0.95  # of these; a lossy code may miss some


def describe_index(path: Path) -> dict[str, Any]:
    """index.json, with the bytes per row of each file and the whole.

    Raises:
        RetrievalError: no index, or one that is not whole.
    """
    facts = read_facts(path)
    each = {name: round(size / facts["images"], 1) for name, size in facts["bytes"].items()}
    return {"index": str(path)} | facts | {"bytes_per_row": each}


def verify_index(path: Path) -> dict[str, Any]:
    """Read every row and ask the index for some of them.

    Returns:
        "index", "images", and "faults": a line for each thing that is wrong, by what it is about.

    Raises:
        RetrievalError: no index, or one whose files cannot be opened.
    """
    index = Index(path)
    files = generation(path, index.facts)
    faults: dict[str, str] = {}
    rows_ND = index.rows.stored_ND
    for start in range(0, len(index), BLOCK_ROWS):
        try:
            check_unit(rows_ND[start : start + BLOCK_ROWS], f"{files / 'rows.index'} from {start}")
        except RetrievalError as error:
            faults["embeddings"] = str(error)
            break
    told = sum(part["rows"] for part in index.facts["parts"])
    if told != len(index):
        faults["parts"] = f"index.json tells of {told} rows in its parts, there are {len(index)}"
    nameless = index.metadata.table["key"].null_count
    if nameless:
        faults["metadata"] = f"{nameless} rows have no key"
    asked = np.random.default_rng(0).permutation(len(index))[:_ASKED]
    if "embeddings" not in faults:
        found = _find_themselves(index, np.sort(asked))
        if found < _FOUND:
            faults["image.index"] = (
                f"{found:.1%} of {len(asked)} rows find themselves, expected {_FOUND:.0%} or more"
            )
    return {"index": str(path), "images": len(index), "faults": faults}


def _find_themselves(index: Index, rows_Q: Any) -> float:
    """The share of rows whose best match is as good as itself."""
    queries_QD: Float32 = index.rows.unit(rows_Q)
    best = [matches[0].similarity if matches else 0.0 for matches in index.search(queries_QD, 1)]
    return float(np.mean(np.array(best) > 1 - 1e-5))
