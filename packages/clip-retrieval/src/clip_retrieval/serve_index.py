"""An index that is being served: its questions answered, and opened again when it is replaced."""

# Q questions, D embedding width, B pictures

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_models import LoadedModel
from torch import Tensor

from clip_retrieval.embed import embed_texts
from clip_retrieval.errors import RetrievalError
from clip_retrieval.layout import read_facts
from clip_retrieval.query import to_json
from clip_retrieval.search import Index
from clip_retrieval.serve_metrics import Metrics
from clip_retrieval.serve_requests import Question, RefusedError, bad
from clip_retrieval.vectors import Float32

log = logging.getLogger(__name__)

_COLUMNS = {"caption": "caption", "image_path": "key"}  # clip-retrieval's names and ours


@dataclass(frozen=True)
class Answer:
    """Hits in JSON, and the version of the index that their ids belong to."""

    hits: bytes
    version: str


class Opened:
    """An index, and a name for its contents: with the same one an id means the same picture."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.index = Index(path, device)
        self.version = hashlib.sha256(json.dumps(self.index.facts).encode()).hexdigest()[:12]


class ServedIndex:
    """One index and its model.

    Attributes:
        now: the index as it is at present; whoever takes it can go on with it.

    Args:
        fold: cosine similarity from which a hit is a duplicate of a better one.

    Raises:
        RetrievalError: no index, or another model than the index's.
    """

    def __init__(self, path: Path, model: Path | None, device: str, fold: float) -> None:
        self.fold, self._device = fold, device
        self._complaint = ""
        self.now = Opened(path, device)
        self.loaded: LoadedModel = self.now.index.load_model(model, device)

    def refresh(self) -> None:
        """Open the index again if it has been replaced; questions go to the old one meanwhile."""
        try:
            old = self.now.index
            if read_facts(old.path) == old.facts:  # another generation, or one that was built anew
                return
            new = Opened(old.path, self._device)
            if new.index.facts["inputs"] != old.facts["inputs"]:
                raise RetrievalError(f"{old.path} is another model's now; start serve again")
        except (RetrievalError, OSError) as error:
            if str(error) != self._complaint:  # once, not every second
                log.warning("%s; the index as it was goes on answering", error)
            self._complaint = str(error)
            return
        self.now = new
        log.info("%s: opened again, %d images", old.path, len(new.index))

    def answer(
        self, questions: Sequence[Question], metrics: Metrics
    ) -> list[Answer | RefusedError]:
        """The questions' answers, all from the index as it is now."""
        now = self.now
        index = now.index
        answers = dict[int, Answer | RefusedError]()
        for q, question in enumerate(questions):
            if question.row is not None and question.row >= len(index):
                answers[q] = bad(f"id: {question.row} is gone, {len(index):,} pictures are left")
        asked = [q for q in range(len(questions)) if q not in answers]
        vectors_QD = self._vectors(index, [questions[q] for q in asked], metrics)
        vector_of = dict(zip(asked, vectors_QD, strict=True))

        def kind(q: int) -> tuple[int, bool]:
            return questions[q].hits, questions[q].fold

        # those that ask for as much are searched for together
        for (k, fold), group in groupby(sorted(asked, key=kind), kind):
            alike = list(group)
            with metrics.steps["knn_index_time"].time():
                queries_QD = np.stack([vector_of[q] for q in alike])
                found = index.search(queries_QD, k, fold=self.fold if fold else None)
            with metrics.steps["metadata_get_time"].time():
                for q, matches in zip(alike, found, strict=True):
                    hits = [
                        (describe(index, match.row) if n < questions[q].described else {})
                        | {"id": match.row, "similarity": match.similarity}
                        | ({"duplicates": match.duplicates} if match.duplicates else {})
                        for n, match in enumerate(matches)
                    ]
                    answers[q] = Answer(to_json(hits), now.version)
        return [answers[q] for q in range(len(questions))]

    def _vectors(self, index: Index, questions: Sequence[Question], metrics: Metrics) -> Float32:
        """The questions as unit rows; texts are encoded together, and so are pictures."""
        vectors_QD = np.empty((len(questions), self.loaded.config.embed_dim), np.float32)
        texts = {q: asked.text for q, asked in enumerate(questions) if asked.text is not None}
        if texts:
            with metrics.steps["text_clip_inference_time"].time():
                vectors_QD[list(texts)] = embed_texts(self.loaded, list(texts.values()))
        pixels = {q: x for q, asked in enumerate(questions) if (x := asked.pixels_3SS) is not None}
        if pixels:
            with metrics.steps["image_clip_inference_time"].time():
                images_B3SS = torch.stack(list(pixels.values()))
                vectors_QD[list(pixels)] = self._encode(images_B3SS)
        for q, question in enumerate(questions):
            if question.vector_D is not None:
                vectors_QD[q] = question.vector_D
            if question.row is not None:
                vectors_QD[q] = index.vector(question.row)
        return vectors_QD

    def _encode(self, images_B3SS: Tensor) -> Float32:
        model, preprocess = self.loaded.model, self.loaded.preprocess
        with torch.inference_mode():
            pixels_B3SS = images_B3SS.to(next(model.parameters()).device)
            rows_BD = model.encode_image(preprocess.normalize(pixels_B3SS), normalize=True)
        return rows_BD.float().cpu().numpy()


def describe(index: Index, row: int) -> dict[str, Any]:
    """A row's metadata in clip-retrieval's shape: its columns, those of the .json among them."""
    values = index.row(row)
    columns = values["json"] if isinstance(values["json"], dict) else {}
    url = {"url": values["url"]} if values["url"] else {}
    return columns | url | {name: values[ours] for name, ours in _COLUMNS.items()}
