"""All alphas on all sets in one pass of decoding.

Decoded images are gathered into chunks, and the image tower takes the weights of one alpha after
the other over each: blending them costs one pass over the weights a chunk, and the memory of three
towers however many alphas there are.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from clip_models import Head, LoadedModel
from tqdm import tqdm

from clip_finetune.batches import Batch, EvalBatches, loader, refuse_corrupt
from clip_finetune.labelled_set import LabelledSet
from clip_finetune.tower import blend_tower

# A alphas, N images of a set that could be decoded, B batch

_CHUNK = 1024  # images, at 224 pixels 150 MB; blending a tower then costs little beside encoding

Hits = npt.NDArray[np.bool_]


@torch.inference_mode()
def score_all(
    base: LoadedModel,
    finetuned: LoadedModel,
    sets: Sequence[LabelledSet],
    heads: Sequence[Sequence[Head]],
    alphas: Sequence[float],
    *,
    batch_size: int,
    workers: int,
) -> tuple[list[Hits], list[int]]:
    """(which images each alpha gets right [A, N], how many images are corrupt) of each set.

    Args:
        heads: of each set at each alpha. `base` has other weights afterwards.

    Raises:
        FinetuneError: more than 5% of a set's images are corrupt.
    """
    visual = base.model.visual.state_dict()
    theta0 = {f"visual.{name}": weight.clone() for name, weight in visual.items()}
    theta1 = finetuned.model.state_dict()
    found: list[list[list[Hits]]] = [[[] for _ in alphas] for _ in sets]
    corrupt = [0] * len(sets)
    batches = EvalBatches(sets, base.preprocess, batch_size)
    read = loader(batches, range(len(batches)), workers=workers)
    for chunk in _chunks(tqdm(read, total=len(batches), desc="curve", disable=None)):
        for batch in chunk:
            corrupt[batch.source] += batch.corrupt
            refuse_corrupt(sets[batch.source], corrupt[batch.source], 0)
        for number, alpha in enumerate(alphas):
            blend_tower(base.model, theta0, theta1, alpha)
            for batch in chunk:
                hits = _hits(base, batch, heads[batch.source][number])
                found[batch.source][number].append(hits)
    return [np.stack([np.concatenate(rows) for rows in of_set]) for of_set in found], corrupt


def _chunks(batches: Iterable[Batch]) -> Iterable[list[Batch]]:
    chunk: list[Batch] = []
    for batch in batches:
        chunk.append(batch)
        if sum(len(some.labels) for some in chunk) >= _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _hits(base: LoadedModel, batch: Batch, head: Head) -> Hits:
    if not len(batch.labels):
        return np.zeros(0, dtype=np.bool_)
    device = base.model.logit_scale.device
    images_B3SS = base.preprocess.normalize(batch.images.to(device))
    answers_B = head.logits(base.model.encode_image(images_B3SS)).argmax(dim=1)
    return (answers_B.cpu() == batch.labels).numpy()
