"""A training run from its arguments to RUN/model, stoppable anywhere."""

import logging
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from clip_models import save_model
from torch import Tensor
from tqdm import tqdm

from clip_train import metrics
from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.initial import build_initial, describe_initial
from clip_train.loader import Batch, Batches, load
from clip_train.order import Order, derive_seed, extend_hash
from clip_train.processes import Agreement, start_processes
from clip_train.shards import Data, open_data
from clip_train.state import (
    Position,
    check_run,
    claim_run,
    identity,
    load_state,
    newest_state,
    save_state,
)
from clip_train.step import Update, learning_rate, make_loss, make_optimizer, train_step

logger = logging.getLogger(__name__)

Status = Literal["finished", "stopped", "nothing left to do"]


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended."""

    status: Status
    output: str  # the run directory
    model: str | None  # the model directory; None if the run is not finished
    step: int
    steps: int  # of the whole run
    samples: int  # samples seen
    loss: float | None  # of the last logged step
    unreadable: int  # samples replaced
    order_hash: str  # of all samples seen, in order


def train(config: TrainConfig) -> Summary:
    """Train, or continue, the run in `config.output`. Every process of the run calls this.

    SIGTERM or Ctrl-C: the step is finished, the state saved, and the status is "stopped".

    Raises:
        TrainError: wrong or missing data, a run directory of other settings, too many unreadable
            samples. ModelError: a broken model directory or configuration.
    """
    accelerator = start_processes()
    if config.batch_size % accelerator.num_processes:
        raise TrainError(
            f"--batch-size {config.batch_size} is global: it must be a multiple of the "
            f"{accelerator.num_processes} processes"
        )
    data = open_data(config.train_data)
    gpu_has_bf16 = accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and gpu_has_bf16)
    wanted = identity(config, bf16=bf16, model=describe_initial(config.model), data=data.hash)
    if check_run(config.output, wanted):
        summary = _summary("nothing left to do", config, Position(step=config.steps))
    else:
        summary = Trainer(config, accelerator, data, wanted, bf16=bf16).run()
    accelerator.wait_for_everyone()  # a launcher ends all processes when one leaves with code 3
    accelerator.end_training()
    return summary


class Trainer:
    """The parts of a run, and the loop over its steps."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        data: Data,
        wanted: dict[str, Any],
        *,
        bf16: bool,
    ) -> None:
        """Build the model and optimizer, and take up the newest train state of the run."""
        self.config = config
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.data = data
        self.wanted = wanted
        self.bf16 = bf16
        self.model, self.preprocess, self.tokenizer = build_initial(config.model, config.seed)
        self.wrapped = accelerator.prepare(self.model.train())  # moved; several processes: DDP
        self.loss_of = make_loss(self.model, accelerator.num_processes)
        self.optimizer = make_optimizer(self.model, config)
        self.order = Order(data.counts, config.seed, config.shuffle_shards)
        self.batches = Batches(
            data.shards,
            self.order,
            self.preprocess,
            self.tokenizer,
            batch_size=config.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        # DDP has met: every process has passed its checks, and from here on files are written.
        if self.main:
            claim_run(config.output, wanted)
        state = newest_state(config.output)
        self.position = load_state(state, self.model, self.optimizer) if state else Position()
        if self.main:
            metrics.truncate(config.output, self.position.step)

    def run(self) -> Summary:
        """Take the steps that are left; write the model directory after the last."""
        config = self.config
        self._announce()
        steps = range(self.position.step, config.steps)
        loader = load(self.batches, steps, config.workers, self.accelerator.device)
        progress = tqdm(
            total=config.steps * config.batch_size,
            initial=self.samples,
            unit=" pairs",
            unit_scale=True,
            disable=None if self.main else True,  # None: only on a terminal
        )
        meter = metrics.Meter(self.position.step, config.batch_size)
        try:
            with progress, Agreement(self.accelerator.num_processes) as agreement:
                for _ in steps:
                    with meter.waiting():
                        batch = next(loader)
                    if self._agree(agreement, batch) == "stop":
                        self._save()
                        return _summary("stopped", config, self.position)
                    update = self._step(batch)
                    last = self.position.step == config.steps
                    if last or self.position.step % config.log_every == 0:
                        row = self._row(update) | meter.rates(self.position.step)
                        if self.main:
                            metrics.append(config.output, row)
                        progress.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    if not last and self.position.step % config.save_every == 0:
                        self._save()
                    progress.update(config.batch_size)
        finally:
            del loader  # ends its workers: they ignore SIGTERM, so an exit on an error would hang
        self._finish()
        return _summary("finished", config, self.position)

    @property
    def samples(self) -> int:
        """Samples seen so far."""
        return self.position.step * self.config.batch_size

    def _agree(self, agreement: Agreement, batch: Batch) -> Literal["go", "stop"]:
        """Settle with the other processes whether to take the next step.

        Raises:
            TrainError: on all processes, if one has no batch or too many samples were unreadable.
        """
        for line in batch.unreadable:
            logger.warning("unreadable sample replaced: %s", line)
        stop, failures, unreadable = agreement.sums(
            agreement.stop_requested, batch.failure is not None, len(batch.unreadable)
        )
        if failures:
            raise TrainError(batch.failure or "another process failed; its own message says why")
        if stop:
            return "stop"
        self.position = replace(self.position, unreadable=self.position.unreadable + unreadable)
        # A few early failures say little: judge by at least an epoch or a thousand samples.
        judged = max(self.samples, min(len(self.order), 1000))
        if self.position.unreadable > self.config.max_error_share * judged:
            raise TrainError(
                f"{self.position.unreadable} unreadable samples after {self.samples:,} seen, "
                f"more than --max-error-share {self.config.max_error_share}; named above: "
                "repair the shards (clip-data verify) or raise the share"
            )
        return "go"

    def _step(self, batch: Batch) -> Update:
        config, position, device = self.config, self.position, self.accelerator.device
        # Its random numbers (patch dropout, drop path) follow from its number: no state to save.
        torch.manual_seed(derive_seed(config.seed, position.step, self.accelerator.process_index))
        update = train_step(
            self.wrapped,
            self.model,
            self.loss_of,
            self.optimizer,
            self.preprocess.normalize(batch.images_b3SS.to(device, non_blocking=True)),
            batch.tokens_bL.to(device, non_blocking=True),
            lr=learning_rate(position.step, config),
            grad_clip=config.grad_clip,
            bf16=self.bf16,
        )
        samples = self.order.samples(self.samples, self.samples + config.batch_size)
        order_hash = extend_hash(position.order_hash, samples)
        self.position = replace(position, step=position.step + 1, order_hash=order_hash)
        return update

    def _row(self, update: Update) -> metrics.Row:
        """The last step's row for metrics.jsonl, all but the rates. Every process must call it."""
        loss = cast(Tensor, self.accelerator.reduce(update.loss, reduction="mean"))
        return {
            "step": self.position.step,
            "samples": self.samples,
            "loss": loss.item(),
            "lr": learning_rate(self.position.step - 1, self.config),
            "logit_scale": self.model.logit_scale.exp().item(),
            "grad_norm": update.grad_norm.item(),
            "unreadable": self.position.unreadable,
            "order_hash": self.position.order_hash,
        }

    def _save(self) -> None:
        if self.main and self.position.step:
            save_state(self.config.output, self.position, self.model, self.optimizer)

    def _announce(self) -> None:
        config, processes = self.config, self.accelerator.num_processes
        if self.position.step:
            logger.info("continuing after step %d", self.position.step)
        logger.info(
            "%s: %d steps of %d pairs; %d pairs in %d shards; processes: %d on %s; %s%s",
            config.model,
            config.steps,
            config.batch_size,
            len(self.order),
            len(self.data.shards),
            processes,
            self.accelerator.device.type,
            "bf16" if self.bf16 else "fp32",
            f"; threads: {torch.get_num_threads()}"
            if self.accelerator.device.type == "cpu"
            else "",
        )
        if config.batch_size > len(self.order):
            logger.warning("the batch is larger than the data: a batch holds a pair several times")

    def _finish(self) -> None:
        if self.main:
            metrics.plot_loss(self.config.output)
            provenance = {
                "tool": f"clip-train {version('clip-train')}",
                "arguments": self.config.arguments,
                "initial_model": self.wanted["model"],
                "samples_seen": self.samples,
                "unreadable": self.position.unreadable,
                "order_hash": self.position.order_hash,
                "data_hash": self.data.hash,
                "manifest_hash": self.data.manifest_hash,
            }
            path = self.config.output / "model"  # last: it marks the run as finished
            save_model(path, self.model.eval(), self.preprocess, provenance, self.tokenizer)


def _summary(status: Status, config: TrainConfig, position: Position) -> Summary:
    rows = metrics.read_rows(config.output)
    last = rows[-1] if rows else {}
    done = status != "stopped"
    return Summary(
        status=status,
        output=str(config.output),
        model=str(config.output / "model") if done else None,
        step=position.step,
        steps=config.steps,
        samples=position.step * config.batch_size,
        loss=last.get("loss"),
        unreadable=last.get("unreadable", 0) if done else position.unreadable,
        order_hash=last.get("order_hash", "") if done else position.order_hash,
    )
