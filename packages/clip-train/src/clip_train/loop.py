"""A training run from its arguments to RUN/model, stoppable anywhere."""

import logging
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from clip_models import load_model, profile
from torch import Tensor
from tqdm import tqdm

from clip_train import metrics
from clip_train.config import TrainConfig
from clip_train.ema import Ema
from clip_train.errors import TrainError
from clip_train.health import check_skipped, check_unreadable, count_skipped
from clip_train.initial import build_initial, describe_initial
from clip_train.loader import Batch, Batches, load
from clip_train.optimizers import make_optimizer
from clip_train.order import derive_seed, extend_hash, make_stream
from clip_train.processes import (
    AUTOCAST,
    Agreement,
    check_same,
    choose_precision,
    distribute,
    failures_named,
    start_processes,
    start_tracker,
)
from clip_train.saving import Saver
from clip_train.shards import Data, open_data
from clip_train.state import (
    Position,
    check_run,
    claim_run,
    identity,
    lock_run,
    newest_state,
    publish_models,
    read_position,
)
from clip_train.step import Stepper, Update, learning_rate
from clip_train.summary import Summary, summarize
from clip_train.validate import Validator

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Summary:
    """Train, or continue, the run in `config.output`. Every process of the run calls this.

    SIGTERM, SIGUSR1, Ctrl-C or the time limit: the step is finished, the state saved, and the
    status is "stopped".

    Raises:
        TrainError: wrong or missing data, a run directory of other settings, too many unreadable
            samples or skipped steps. ModelError: a broken model directory or configuration.
    """
    accelerator = start_processes(config)
    if config.batch_size % accelerator.num_processes:
        raise TrainError(
            f"--batch-size {config.batch_size} is global: it must be a multiple of the "
            f"{accelerator.num_processes} processes"
        )
    data = open_data(config.train_data, config.train_weights)
    precision = choose_precision(config.precision, accelerator.device)
    model = describe_initial(config.model)
    wanted = identity(config, precision=precision, model=model, data=data.hash)
    finished = check_run(config.output, wanted, rebase=config.rebase)
    check_same(accelerator, [wanted, finished])
    if finished:
        summary = summarize("nothing left to do", config.output)
    else:
        trainer = Trainer(config, accelerator, data, wanted)
        with trainer.lock:
            summary = trainer.run()
    accelerator.wait_for_everyone()  # a launcher ends all processes when one leaves with code 3
    accelerator.end_training()
    return summary


class Trainer:
    """The parts of a run, and the loop over its steps."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, data: Data, wanted: dict[str, Any]
    ) -> None:
        """Build the model and optimizer, and take up the newest train state of the run."""
        self.started = time.monotonic()
        self.config = config
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.data = data
        self.wanted = wanted
        world = accelerator.num_processes
        self.model, self.preprocess, self.tokenizer = build_initial(config)
        path, self.position = newest_state(config.output), Position()
        if path:
            self.position = read_position(path)
            self.model.load_state_dict(load_model(path / "model").model.state_dict())
        if config.compile:
            self.model.compile()
        wrapped = distribute(self.model, accelerator)
        autocast = AUTOCAST[wanted["precision"]]
        self.optimizer = make_optimizer(self.model, config)
        self.stepper = Stepper(
            wrapped,
            self.model,
            self.optimizer,
            config,
            normalize=self.preprocess.normalize,
            autocast=autocast,
            world=world,
        )
        self.ema = Ema(self.model, config.ema) if config.ema else None
        tools = self.preprocess, self.tokenizer
        learned = self.optimizer, self.stepper.guard, self.ema
        self.saver = Saver(config, data, wanted["model"], self.model, *tools, *learned)
        if path:
            self.saver.restore(path)
        left = config.samples_seen - self.position.samples
        if left <= -config.batch_size:
            raise TrainError(
                f"--samples-seen {config.samples_seen}: {config.output} has seen "
                f"{self.position.samples} already"
            )
        self.steps = self.position.step + max(0, -(-left // config.batch_size))
        self.order = make_stream(data, config)
        self.batches = Batches(
            data.shards,
            self.order,
            *tools,
            batch_size=config.batch_size,
            rank=accelerator.process_index,
            world=world,
            first=(self.position.step, self.position.samples),
        )
        self.validator = Validator(config, *tools, accelerator, autocast=autocast)
        self.unsettled: list[tuple[int, Update]] = []  # steps whose findings are on the device yet
        self.saved = time.monotonic()
        gmacs = profile(self.model.config)["gmacs"]
        self.meter = metrics.Meter(self.position.step, config.batch_size, world, gmacs)
        check_same(accelerator, self.position)
        # Every process has passed its checks, and from here on files are written.
        self.lock = lock_run(config.output) if self.main else nullcontext()
        if self.main:
            claim_run(config.output, wanted, self.position.step)
            metrics.truncate(config.output, self.position.step)
        start_tracker(accelerator, config)

    def run(self) -> Summary:
        """Take the steps that are left; write the model directory after the last."""
        config = self.config
        self._announce()
        steps = range(self.position.step, self.steps)
        loader = load(self.batches, steps, config.workers, self.accelerator.device)
        progress = tqdm(
            total=self.position.samples + len(steps) * config.batch_size,
            initial=self.position.samples,
            unit=" pairs",
            unit_scale=True,
            disable=None if self.main else True,  # None: only on a terminal
        )
        validated = config.val_data or config.zeroshot_data
        try:
            with failures_named(), progress, Agreement(self.accelerator.num_processes) as agreement:
                for _ in steps:
                    with self.meter.waiting():
                        batch = next(loader)
                    if self._agree(agreement, batch) == "stop":
                        return summarize("stopped", config.output, self.steps)
                    update = self._step(batch)
                    step, last = self.position.step, self.position.step == self.steps
                    if last or step % config.log_every == 0:
                        row = self._row(update) | self.meter.rates(step)
                        self._log(row, metrics.METRICS)
                        progress.set_postfix_str(metrics.describe(row), refresh=False)
                    progress.update(config.batch_size)
                    if validated and (last or step % config.eval_every == 0):
                        with self.meter.paused():
                            scores = self._place() | self.validator.run(self.model)
                        self._log(scores, metrics.VALIDATION)
                    if last or step % config.save_every == 0:
                        self._save()
        finally:
            del loader  # ends its workers: they ignore SIGTERM, so an exit on an error would hang
        if self.main:
            metrics.plot_loss(config.output)
            publish_models(config.output)
        return summarize("finished", config.output)

    def _agree(self, agreement: Agreement, batch: Batch) -> Literal["go", "stop"]:
        """Settle with the other processes whether to save now, and to take the next step.

        Raises:
            TrainError: on all processes, if one has no batch or too many samples were unreadable.
        """
        config, now = self.config, time.monotonic()
        for line in batch.unreadable:
            logger.warning("unreadable sample replaced: %s", line)
        late = bool(config.time_limit) and now - self.started > 60 * config.time_limit
        due = bool(config.save_minutes) and now - self.saved > 60 * config.save_minutes
        stop, save, failures, unreadable = agreement.sums(
            agreement.stop_requested or late,
            due,
            batch.failure is not None,
            len(batch.unreadable),
        )
        counted = replace(self.position, unreadable=self.position.unreadable + unreadable)
        try:
            if failures:
                raise TrainError(batch.failure or "another process failed, and says why")
            check_unreadable(counted, len(self.order), config.max_error_share)
        except TrainError:
            self._save()  # the steps so far are good
            raise
        if stop or save:
            self._save()  # before this batch counts: who continues reads it again
        if stop:
            return "stop"
        self.position = counted
        return "go"

    def _step(self, batch: Batch) -> Update:
        config, position, device = self.config, self.position, self.accelerator.device
        update = self.stepper.step(
            batch.images_b3SS.to(device, non_blocking=True),
            batch.tokens_bL,  # the text tower packs them on the CPU
            lr=learning_rate(position.step, self.steps, config),
            # Random numbers follow from the step's own: no state to save.
            seed=derive_seed(config.seed, position.step, self.accelerator.process_index),
        )
        end = position.samples + config.batch_size
        order_hash = extend_hash(position.order_hash, self.order.samples(position.samples, end))
        step = position.step + 1
        self.position = replace(position, step=step, samples=end, order_hash=order_hash)
        self.unsettled.append((step, update))
        if self.ema:
            self.ema.update(step)
        return update

    def _settle(self) -> None:
        """Look at what the steps since the last look found, which waits for them."""
        steps, self.unsettled = self.unsettled, []
        self.position, skipped = count_skipped(self.position, steps)
        for row in skipped if self.main else ():
            row["samples"] = self.batches.names(row["step"] - 1)
            metrics.append(self.config.output, row, metrics.SKIPPED)
            logger.warning("step %d skipped: gradient norm %s", row["step"], row["grad_norm"])
        check_skipped(self.position, self.config)

    def _row(self, update: Update) -> metrics.Row:
        """The last step's row for metrics.jsonl, all but the rates. Every process must call it."""
        self._settle()
        loss = cast(Tensor, self.accelerator.reduce(update.loss, reduction="mean"))
        return self._place() | {
            "loss": loss.item(),
            "lr": learning_rate(self.position.step - 1, self.steps, self.config),
            "logit_scale": self.model.logit_scale.exp().item(),
            "grad_norm": update.grad_norm.item(),
            "unreadable": self.position.unreadable,
            "skipped": self.position.skipped,
            "order_hash": self.position.order_hash,
        }

    def _place(self) -> metrics.Row:
        return {"step": self.position.step, "samples": self.position.samples}

    def _log(self, row: metrics.Row, name: str) -> None:
        if self.main:
            metrics.append(self.config.output, row, name)
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        self.accelerator.log(numbers, step=self.position.step)

    def _save(self) -> None:
        """Write the train state. Every process must call it."""
        self._settle()
        self.saved = time.monotonic()
        if self.position.step:
            with self.meter.paused():
                self.saver.save(self.position, main=self.main)

    def _announce(self) -> None:
        config, device = self.config, self.accelerator.device.type
        threads = f" with {torch.get_num_threads()} threads" if device == "cpu" else ""
        if self.position.step:
            logger.info("continuing after step %d", self.position.step)
        logger.info(
            f"{config.model}: {self.steps} steps of {config.batch_size} pairs; {len(self.order)} "
            f"pairs in {len(self.data.shards)} shards; processes: "
            f"{self.accelerator.num_processes} on {device}{threads}; {self.wanted['precision']}"
        )
        if config.batch_size > len(self.order):
            logger.warning("the batch is larger than the data: a batch holds a pair several times")
