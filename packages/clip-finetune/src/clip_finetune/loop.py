"""`clip-finetune train`: a run from its arguments to the model directory, stoppable anywhere.

One optimizer step per batch, batches alternating by task: the OpenCLIP paper's joint fine-tuning
(section 4.4), which is PAINT's procedure (Ilharco et al., 2208.05592) for several tasks at once.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from clip_models import LoadedModel, fingerprint_of, load_model, read_model_config
from torch import Tensor, nn
from tqdm import tqdm

from clip_finetune.augment import Augment, Erase
from clip_finetune.batches import Batch, TrainBatches, derive_seed, loader, refuse_corrupt
from clip_finetune.config import TrainConfig
from clip_finetune.errors import FinetuneError
from clip_finetune.identity import refuse_other
from clip_finetune.learner import Learner
from clip_finetune.optimizer import learning_rate, make_optimizer, set_rate
from clip_finetune.processes import distribute, failures_named, join_processes, stop_signals
from clip_finetune.publish import publish
from clip_finetune.state import TrainState
from clip_finetune.tasks import Task, open_tasks
from clip_finetune.tower import prepare_tower

# B batch (of this process), S image side, L tokens of a prompt

log = logging.getLogger(__name__)


def train(model: Path, out: Path, config: TrainConfig) -> dict[str, Any]:
    """Fine-tune `model` into the model directory `out`.

    Run again, it continues from the train state beside `out`, or finds `out` finished. SIGTERM,
    SIGUSR1 or Ctrl-C saves the train state and returns with status "stopped".

    Returns:
        {"status": "trained" | "stopped" | "nothing left to do", "out", "fingerprint", "step", …}

    Raises:
        FinetuneError: see `open_tasks`; also a loss that is not finite, more than 5% corrupt
            images, and an `out` or a train state of another run, or that cannot become a folder;
            memory that runs out, and a process that is lost.
        ModelError: from the model directory.
    """
    if not out.name or (out.is_symlink() and not out.exists()):
        raise FinetuneError(f"{out} cannot become a new folder; name another OUT")
    tasks, run = describe_run(model, config)
    steps, _ = config.schedule(sum(len(task.data) for task in tasks))
    state = TrainState(out, run)
    if out.exists():
        refuse_other(out, read_model_config(out)[1].get("provenance", {}), run)
        log.info("%s is finished: nothing left to do", out)
        state.remove()
        return _result("nothing left to do", out, steps, run)

    accelerator = join_processes()
    trainer = Trainer(model, config, tasks, accelerator, state)
    trainer.resume()
    with failures_named():
        status = "trained" if trainer.run() else "stopped"
    if status == "trained" and accelerator.is_main_process:
        heads = dict(zip(tasks, trainer.heads, strict=True))
        publish(out, trainer.loaded, heads, trainer.learned_state(), state, trainer.summary())
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return _result(status, out, trainer.step, run) | {"corrupt": sum(trainer.corrupt)}


def describe_run(model: Path, config: TrainConfig) -> tuple[list[Task], dict[str, Any]]:
    """The tasks, and what decides the run's result: base model, arguments, data by content."""
    tasks = open_tasks(model, config)
    run = {
        "base": fingerprint_of(model),
        "arguments": config.recipe(),
        "tasks": [task.describe() for task in tasks],
    }
    return tasks, run


class Trainer:
    """A run in memory: `step` updates are done; the rest follows from the configuration."""

    def __init__(
        self,
        model: Path,
        config: TrainConfig,
        tasks: list[Task],
        accelerator: Accelerator,
        state: TrainState,
    ) -> None:
        self.config, self.tasks, self.state = config, tasks, state
        self.accelerator, self.device = accelerator, accelerator.device
        self.main, self.world = accelerator.is_main_process, accelerator.num_processes
        self.steps, self.warmup = config.schedule(sum(len(task.data) for task in tasks))
        loaded = load_model(model, device=self.device)
        self.heads = [task.initial_head(loaded, self.device) for task in tasks]
        self.loaded: LoadedModel = prepare_tower(
            loaded, image_size=config.image_size, drop_path=config.drop_path
        )
        preprocess = self.loaded.preprocess
        self.batches = TrainBatches(
            [task.data for task in tasks],
            Augment(config.augment, preprocess) if config.augment else preprocess.train,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            world=self.world,
        )
        self.erase = Erase(config.random_erasing, self.device) if config.random_erasing else None
        self.learner = Learner(self.loaded.model, self.heads, config, self.world)
        self.learning = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.learner, config)
        self.ema = _running_mean(self.learner, config.ema) if config.ema else None
        trained_heads = config.method in ("end-to-end", "lp-ft") and len(tasks) > 1
        self.wrapped = distribute(self.learner, accelerator, partly_used=trained_heads)
        self.step = 0
        self.corrupt = [0] * len(tasks)

    def resume(self) -> None:
        """Go to where the saved state, if any, left off."""
        saved = self.state.load()
        if saved is not None:
            self.learner.load_state_dict(saved["learner"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.ema:
                self.ema.module.load_state_dict(saved["ema"])
            self.step, self.corrupt = saved["step"], saved["corrupt"]
            log.info("continuing after step %d", self.step)
        self.accelerator.wait_for_everyone()
        if self.main:
            self.state.begin(self.step)

    def run(self) -> bool:
        """Train to the end; False: told to stop, with the state saved."""
        config, samples = self.config, sum(len(task.data) for task in self.tasks)
        log.info(
            f"{config.method}: {self.steps} steps of {config.batch_size} images, "
            f"{self.steps * config.batch_size / samples:.1f} epochs of {len(self.tasks)} task(s); "
            f"{self.world} process(es) on {self.device.type}"
        )
        order = range(self.step, self.steps)
        progress = tqdm(
            loader(self.batches, order, workers=config.workers),
            desc="fine-tune",
            initial=self.step,
            total=self.steps,
            disable=None if self.main else True,
        )
        with stop_signals() as told:
            start = time.monotonic()
            for batch in progress:
                row, stop = self.update(batch, told.is_set())
                seconds, start = time.monotonic() - start, time.monotonic()
                if self.main:
                    rate = round(config.batch_size / seconds, 1)
                    self.state.log(row | {"images_per_second": rate})
                    progress.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                if stop:
                    self.save()
                    log.info("stopped after step %d; run again to continue", self.step)
                    return False
                if config.save_every and self.step % config.save_every == 0:
                    self.save()
        return True

    def update(self, batch: Batch, told: bool) -> tuple[dict[str, Any], bool]:
        """One step; (its line of metrics, whether any process was told to stop)."""
        config, task = self.config, self.tasks[batch.source]
        # whatever is random (erasing, drop-path) is a function of the step too
        seed = derive_seed(config.seed, self.step, self.accelerator.process_index)
        torch.manual_seed(seed)
        if not batch.images.numel():  # then all processes find so
            refuse_corrupt(task.data, len(task.data), 0)
        images_B3SS = self.loaded.preprocess.normalize(batch.images.to(self.device))
        if self.erase:
            images_B3SS = self.erase(images_B3SS, seed)
        prompts_BL = self._prompts(task, batch) if config.method == "flyp" else None
        labels_B = batch.labels.to(self.device)
        loss, hits = self.wrapped(images_B3SS, labels_B, batch.source, prompts_BL)

        # One exchange, and one wait for the device, a step: all processes must stop or fail as one.
        told_C = torch.tensor([told, batch.corrupt], device=self.device)
        report = torch.cat([torch.stack([loss.detach(), hits]), told_C])
        total = cast(Tensor, self.accelerator.reduce(report, "sum"))
        loss_sum, hit_sum, stop, corrupt = cast(list[float], total.tolist())
        mean_loss = loss_sum / self.world
        self.corrupt[batch.source] += round(corrupt)
        drawn = (self.step // len(self.tasks) + 1) * config.batch_size
        refuse_corrupt(task.data, self.corrupt[batch.source], drawn)
        if not math.isfinite(mean_loss):
            raise FinetuneError(
                f"the loss is {mean_loss} at step {self.step + 1}, task {task.name!r}; no model "
                f"was written. Try a lower --lr (now {config.lr}) or --precision fp32"
            )

        lr = learning_rate(self.step, config.lr, self.steps, self.warmup)
        set_rate(self.optimizer, lr)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.learning, config.grad_clip or math.inf, foreach=True)
        self.optimizer.step()
        self.learner.after_step()
        self.step += 1
        if self.ema:
            self.ema.update(self.learner, step=self.step)
        accuracy = hit_sum / config.batch_size
        row = {"step": self.step, "task": task.name, "loss": mean_loss, "accuracy": accuracy}
        return row | {"lr": lr, "grad_norm": float(norm)}, stop > 0

    def _prompts(self, task: Task, batch: Batch) -> Tensor:
        """A prompt for each image, of its class and one of the set's templates (FLYP)."""
        templates, names = task.data.templates, task.data.class_names
        chosen = zip((batch.draws % len(templates)).tolist(), batch.labels.tolist(), strict=True)
        return self.loaded.tokenizer([templates[t].replace("{c}", names[y]) for t, y in chosen])

    def learned_state(self) -> dict[str, Tensor]:
        """The learner's weights for OUT: their running mean, where there is one."""
        return (self.ema.module if self.ema else self.learner).state_dict()

    def summary(self) -> dict[str, int]:
        """What provenance says of the run beside its arguments."""
        seen = self.step * self.config.batch_size
        return {"step": self.step, "samples_seen": seen, "corrupt": sum(self.corrupt)}

    def save(self) -> None:
        """Save the train state, once for all processes."""
        if self.main:
            self.state.save(
                step=self.step,
                corrupt=self.corrupt,
                learner=self.learner.state_dict(),
                ema=self.ema.module.state_dict() if self.ema else None,
                optimizer=self.optimizer.state_dict(),
            )


def _running_mean(learner: Learner, decay: float) -> Any:
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(learner, decay=decay)


def _result(status: str, out: Path, step: int, run: dict[str, Any]) -> dict[str, Any]:
    return {
        "status": status,
        "out": str(out),
        "fingerprint": fingerprint_of(out) if out.exists() else None,
        "base": run["base"],
        "step": step,
        "samples_seen": step * run["arguments"]["batch_size"],
        "tasks": {task["name"]: task["samples"] for task in run["tasks"]},
    }
