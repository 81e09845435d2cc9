"""What a model in training is worth on held-out data: loss, Recall@k, zero-shot accuracy.

Every process embeds an equal share and all features meet on every process, so that the values are
the same on all, and the same for any number of processes. Shares are made equal by reading samples
again, which are then cut off: no process makes a forward pass more than another.
"""

# b samples of a forward pass, N samples, C classes, P prompts, T templates, E embedding

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from clip_models import CLIP, HFTokenizer, Preprocess, Tokenizer
from torch import Tensor
from tqdm import tqdm

from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.sharding import is_sharded
from clip_train.validate_data import (
    Read,
    Reader,
    Sample,
    open_labelled_set,
    open_pairs,
    read_ahead,
)
from clip_train.validate_scores import full_precision, mean_loss, ranks

logger = logging.getLogger(__name__)

RECALLS = (1, 5, 10)
_MOST_AT_ONCE = 256  # samples of a forward pass


class Validator:
    """Evaluates a model on `--val-data` and `--zeroshot-data`."""

    def __init__(
        self,
        config: TrainConfig,
        preprocess: Preprocess,
        tokenizer: Tokenizer | HFTokenizer,
        accelerator: Accelerator,
        *,
        autocast: torch.dtype | None,
    ) -> None:
        """Open and check the data; writes nothing.

        Args:
            preprocess: its evaluation transform, without crops, is taken.
            autocast: what the towers compute in; None: float32.

        Raises:
            TrainError, ModelError: as in `open_pairs` and `open_labelled_set`.
        """
        self.config = config
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.accelerator = accelerator
        self.autocast = autocast
        self.size = min(
            config.micro_batch_size or max(1, config.batch_size // accelerator.num_processes),
            _MOST_AT_ONCE,
        )
        self.pairs = open_pairs(config.val_data) if config.val_data else []
        self.labelled = open_labelled_set(config.zeroshot_data) if config.zeroshot_data else None
        self.prompts = self._prompts()
        self._named: set[str] = set()

    def run(self, model: CLIP) -> dict[str, float]:
        """Evaluate; every process must call this, and gets the same values.

        The model is left in the mode it was in. Its towers are called one by one, which runs them
        as they are: a compiled model would be compiled again, for evaluation and for odd shapes.

        On `--val-data`, for the pairs in stored order,
        with the first line of a caption of several:

            val_loss                    mean over whole batches of `batch_size` pairs (over all
                                        pairs if they are fewer), the remainder left out
            image_to_text_recall@1      share of images whose own text is the nearest of all, and
                                        @5, @10; texts as near as their own count as nearer
            text_to_image_recall@1      the same from text to image, and @5, @10
            val_unreadable              pairs left out, named in the log at the first time

        On `--zeroshot-data`: `zeroshot_top1`, above five classes `zeroshot_top5`, and
        `zeroshot_unreadable`.

        Raises:
            TrainError: on all processes, if no sample is readable.
        """
        sharded = any(map(is_sharded, model.parameters()))
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._progress() as progress:
                return self._on_pairs(model, progress) | self._on_classes(model, progress)
        finally:
            model.train(training)
            if sharded:
                cast(Any, model).reshard()  # what the backward pass does after a training step

    def _on_pairs(self, model: CLIP, progress: "tqdm[Any]") -> dict[str, float]:
        if not self.pairs:
            return {}
        images: list[Tensor] = []
        texts: list[Tensor] = []
        readable: list[Tensor] = []
        with closing(self._read(self.pairs, self.tokenizer, progress)) as reads:
            for read in reads:
                with self._autocast():
                    image_bE = model.encode_image(self._pixels(read), normalize=True)
                    # tokens stay on the CPU: the text tower packs them there
                    text_bE = model.encode_text(read.tokens_bL, normalize=True)
                images.append(image_bE.float())
                texts.append(text_bE.float())
                readable.append(read.readable_b)
        good_N = self._good(readable, len(self.pairs), "--val-data")
        image_NE = self._gather(images, len(self.pairs))[good_N]
        text_NE = self._gather(texts, len(self.pairs))[good_N]
        values = {"val_loss": mean_loss(model, image_NE, text_NE, self.config.batch_size)}
        for name, ranks_N in (
            ("image_to_text", ranks(image_NE, text_NE)),
            ("text_to_image", ranks(text_NE, image_NE)),
        ):
            for k in RECALLS:
                values[f"{name}_recall@{k}"] = (ranks_N < k).sum().item() / len(ranks_N)
        return values | {"val_unreadable": len(self.pairs) - len(image_NE)}

    def _on_classes(self, model: CLIP, progress: "tqdm[Any]") -> dict[str, float]:
        data = self.labelled
        if data is None:
            return {}
        weight_CE = self._head(model, len(data.class_names), len(data.templates), progress)
        best: list[Tensor] = []
        readable: list[Tensor] = []
        with closing(self._read(data.samples, None, progress)) as reads:
            for read in reads:
                with self._autocast():
                    image_bE = model.encode_image(self._pixels(read), normalize=True)
                with full_precision():
                    scores_bC = image_bE.float() @ weight_CE.T
                best.append(scores_bC.topk(min(5, len(weight_CE))).indices)
                readable.append(read.readable_b)
        good_N = self._good(readable, len(data.samples), "--zeroshot-data")
        best_NK = self._gather(best, len(data.samples))
        hits_NK = (best_NK == data.labels_N.to(best_NK.device)[:, None])[good_N]
        values = {"zeroshot_top1": hits_NK[:, 0].sum().item() / len(hits_NK)}
        if len(weight_CE) > 5:
            values["zeroshot_top5"] = hits_NK.sum().item() / len(hits_NK)
        return values | {"zeroshot_unreadable": len(data.samples) - len(hits_NK)}

    def _head(self, model: CLIP, classes: int, templates: int, progress: "tqdm[Any]") -> Tensor:
        """Per class the mean of its prompts' embeddings, each and all of length 1: [C, E]."""
        means: list[Tensor] = []
        for tokens_PL in self.prompts:
            with self._autocast():
                prompts_PE = model.encode_text(tokens_PL, normalize=True)
            means.append(prompts_PE.float().unflatten(0, (-1, templates)).mean(1))
            progress.update()
        return F.normalize(self._gather(means, classes), dim=-1)

    def _prompts(self) -> list[Tensor]:
        """The tokens of this process's classes, T rows a class, in parts for a forward pass."""
        data = self.labelled
        if data is None:
            return []
        names, parts = data.class_names, self._share(len(data.class_names), len(data.templates))
        return [
            self.tokenizer(
                [t.replace("{c}", names[i % len(names)]) for i in part for t in data.templates]
            )
            for part in parts
        ]

    def _share(self, n: int, rows: int = 1) -> list[list[int]]:
        """This process's positions, as many as any other's and so perhaps some past n, in parts.

        Args:
            rows: of a forward pass that one position takes.
        """
        share = -(-n // self.accelerator.num_processes)
        first = self.accelerator.process_index * share
        size = max(1, self.size // rows)
        return [
            list(range(start, min(start + size, first + share)))
            for start in range(first, first + share, size)
        ]

    def _read(
        self,
        samples: Sequence[Sample],
        tokenizer: Tokenizer | HFTokenizer | None,
        progress: "tqdm[Any]",
    ) -> Generator[Read]:
        """This process's share; to be closed, as `read_ahead`."""
        reader = Reader(samples, self.preprocess, tokenizer)
        parts, device = self._share(len(samples)), self.accelerator.device
        for read in read_ahead(reader, parts, self.config.workers, device):
            for line in read.unreadable:
                if line not in self._named:
                    logger.warning("unreadable sample left out of validation: %s", line)
            self._named.update(read.unreadable)
            yield read
            progress.update()

    def _pixels(self, read: Read) -> Tensor:
        images_b3SS = read.images_b3SS.to(self.accelerator.device, non_blocking=True)
        return self.preprocess.normalize(images_b3SS)

    def _gather(self, parts: list[Tensor], n: int) -> Tensor:
        """The rows of all processes in order, without those that came again."""
        rows = torch.cat(parts).to(self.accelerator.device)
        return cast(Tensor, self.accelerator.gather(rows))[:n]

    def _good(self, readable: list[Tensor], n: int, option: str) -> Tensor:
        good_N = self._gather(readable, n).bool()
        if not good_N.any():
            raise TrainError(
                f"{option}: none of its {n} samples is readable; the log names them: "
                "repair the shards (clip-data verify)"
            )
        return good_N

    def _autocast(self) -> torch.autocast:
        device, enabled = self.accelerator.device.type, self.autocast is not None
        return torch.autocast(device, self.autocast or torch.bfloat16, enabled=enabled)

    def _progress(self) -> "tqdm[Any]":
        sets = [self.pairs, self.labelled.samples if self.labelled else []]
        return tqdm(
            total=len(self.prompts) + sum(len(self._share(len(samples))) for samples in sets),
            desc="validation",
            leave=False,
            disable=None if self.accelerator.is_main_process else True,  # None: only on a terminal
        )
