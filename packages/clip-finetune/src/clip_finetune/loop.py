"""`clip-finetune train`: the image tower learns, the heads and the text tower stay as they are.

One optimizer step per batch, batches alternating by task: the OpenCLIP paper's joint fine-tuning
(section 4.4), which is PAINT's procedure (Ilharco et al., 2208.05592) for several tasks at once.

BatchNorm layers keep the base model's running statistics (their scale and shift do learn). Batches
of alternating tasks would drag the statistics from one task to the next, and the tower that learns
is then the tower that is evaluated and interpolated. The PAINT and WiSE-FT code lets them move;
the paper's own towers have none.
"""

import logging
import math
import os
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from clip_models import (
    CLIP,
    LoadedModel,
    fingerprint_of,
    load_model,
    read_model_config,
    save_head,
    save_model,
)
from torch import Tensor, nn
from tqdm import tqdm

from clip_finetune.batches import Batch, TrainBatches, derive_seed, loader, refuse_corrupt
from clip_finetune.config import TrainConfig
from clip_finetune.errors import FinetuneError
from clip_finetune.identity import refuse_other
from clip_finetune.processes import join_processes, sigterm
from clip_finetune.state import TrainState
from clip_finetune.tasks import Task, open_tasks

# B batch (of this process), S image side, E embedding

log = logging.getLogger(__name__)


def train(model: Path, out: Path, config: TrainConfig) -> dict[str, Any]:
    """Fine-tune the image tower of `model` into the model directory `out`.

    Run again, it continues from the train state beside `out`, or finds `out` finished. SIGTERM
    saves the train state and returns with status "stopped".

    Returns:
        {"status": "trained" | "stopped" | "nothing left to do", "out", "fingerprint", "step", …}

    Raises:
        FinetuneError: see `open_tasks`; also a loss that is not finite, more than 5% corrupt
            images, and an `out` or a train state of another run.
        ModelError: from the model directory.
    """
    tasks = open_tasks(model, config)
    run = {
        "base": fingerprint_of(model),
        "arguments": config.recipe(),
        "tasks": [task.describe() for task in tasks],
    }
    state = TrainState(out, run)
    if out.exists():
        refuse_other(out, read_model_config(out)[1].get("provenance", {}), run)
        log.info("%s is finished: nothing left to do", out)
        state.remove()
        return _result("nothing left to do", out, config.iterations, run)

    accelerator = join_processes()
    loaded = load_model(model, device=accelerator.device)
    trainer = Trainer(config, tasks, loaded, accelerator, state)
    trainer.resume()
    status = "trained" if trainer.run() else "stopped"
    if status == "trained" and accelerator.is_main_process:
        trainer.publish(out)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return _result(status, out, trainer.step, run) | {"corrupt": sum(trainer.corrupt)}


class ImageEncoder(nn.Module):
    """The image tower as a module of its own, for DDP to wrap."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> embeddings [B, E]."""
        return self.clip.encode_image(images_B3SS)


class Trainer:
    """A run in memory: `step` updates are done; the rest follows from the configuration."""

    def __init__(
        self,
        config: TrainConfig,
        tasks: list[Task],
        loaded: LoadedModel,
        accelerator: Accelerator,
        state: TrainState,
    ) -> None:
        self.config, self.tasks, self.loaded, self.state = config, tasks, loaded, state
        self.accelerator, self.device = accelerator, accelerator.device
        self.heads = [task.frozen_head(loaded, self.device) for task in tasks]
        self.batches = TrainBatches(
            [task.data for task in tasks],
            loaded.preprocess,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
        self.visual = loaded.model.visual
        self.parameters = _only_image_tower_learns(loaded.model)
        self.encoder = cast(nn.Module, accelerator.prepare(ImageEncoder(loaded.model)))
        self.optimizer = _optimizer(self.parameters, config)
        self.step = 0
        self.corrupt = [0] * len(tasks)

    def resume(self) -> None:
        """Go to where the saved state, if any, left off."""
        saved = self.state.load()
        if saved is not None:
            self.visual.load_state_dict(saved["visual"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.corrupt = saved["step"], saved["corrupt"]
            log.info("continuing after step %d", self.step)
        if self.accelerator.is_main_process:
            self.state.begin(self.step)

    def run(self) -> bool:
        """Train to the end; False: stopped by SIGTERM with the state saved."""
        config, main = self.config, self.accelerator.is_main_process
        order = range(self.step, config.iterations)
        progress = tqdm(
            loader(self.batches, order, workers=config.workers),
            desc="fine-tune",
            initial=self.step,
            total=config.iterations,
            disable=None if main else True,
        )
        with sigterm() as terminated:
            for batch in progress:
                row, stop = self.update(batch, terminated.is_set())
                if main:
                    self.state.log(row)
                    progress.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                if stop:
                    self.save()
                    log.info("stopped after step %d; run again to continue", self.step)
                    return False
                if config.save_every and self.step % config.save_every == 0:
                    self.save()
        return True

    def update(self, batch: Batch, terminated: bool) -> tuple[dict[str, Any], bool]:
        """One step; (its line of metrics, whether any process was told to stop)."""
        config, task, head = self.config, self.tasks[batch.source], self.heads[batch.source]
        lr = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # whatever is random in the tower (dropout, drop-path) is a function of the step too
        torch.manual_seed(derive_seed(config.seed, self.step, self.accelerator.process_index))
        images_B3SS = self.loaded.preprocess.normalize(batch.images.to(self.device))
        labels_B = batch.labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            features_BE = self.encoder(images_B3SS)
        logits_BC = head.logits(features_BE.float())
        loss = F.cross_entropy(logits_BC, labels_B)
        hits = (logits_BC.argmax(dim=1) == labels_B).float().mean()

        told = torch.tensor([terminated, batch.corrupt], device=self.device)
        report = torch.cat([torch.stack([loss.detach(), hits]), told])
        mean = cast(Tensor, self.accelerator.reduce(report, "mean"))  # over the processes
        mean_loss, accuracy, stop, corrupt = cast(list[float], mean.tolist())
        self.corrupt[batch.source] += round(corrupt * self.accelerator.num_processes)
        drawn = (self.step // len(self.tasks) + 1) * config.batch_size
        refuse_corrupt(task.data, self.corrupt[batch.source], drawn)
        if not math.isfinite(mean_loss):
            raise FinetuneError(
                f"the loss is {mean_loss} at step {self.step + 1}, task {task.name!r}; no model "
                f"was written. Try a lower --lr (now {config.lr}) or --precision fp32"
            )

        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or math.inf)
        self.optimizer.step()
        self.step += 1
        row = {"step": self.step, "task": task.name, "loss": mean_loss, "accuracy": accuracy}
        return row | {"lr": lr, "grad_norm": float(norm)}, stop > 0

    def save(self) -> None:
        """Save the train state, once for all processes."""
        if self.accelerator.is_main_process:
            self.state.save(
                step=self.step,
                corrupt=self.corrupt,
                visual=self.visual.state_dict(),
                optimizer=self.optimizer.state_dict(),
            )

    def publish(self, out: Path) -> None:
        """Write the model directory with heads and metrics, and rename it to `out` as a whole.

        A zero-shot head stays one: the text tower that made it is unchanged, and would make the
        same head for the new model. Any other head is now half of a fitted pair: "fine-tuned".
        """
        folder = self.state.folder / "model"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed right here
        provenance = {
            "tool": f"clip-finetune {version('clip-finetune')}",
            "command": "train",
            **self.state.run,
            "samples_seen": self.step * self.config.batch_size,
            "corrupt": sum(self.corrupt),
            "base_provenance": self.loaded.provenance,
        }
        loaded = self.loaded
        save_model(folder, loaded.model, loaded.preprocess, provenance, loaded.tokenizer)
        fingerprint = fingerprint_of(folder)
        for task, head in zip(self.tasks, self.heads, strict=True):
            kind = "zero-shot" if head.kind == "zero-shot" else "fine-tuned"
            weight, bias = head.weight.cpu(), head.bias.cpu()
            head = replace(head, weight=weight, bias=bias, kind=kind, fingerprint=fingerprint)
            save_head(folder, task.name, head)
        (folder / "training").mkdir()
        shutil.copyfile(self.state.metrics, folder / "training" / "metrics.jsonl")
        os.rename(folder, out)
        self.state.remove()


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of update `step`, from 0: linear warm-up, cosine to zero (WiSE-FT's `cosine_lr`)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / (config.iterations - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def _only_image_tower_learns(clip: CLIP) -> list[nn.Parameter]:
    """Freeze all but the image tower; its parameters."""
    clip.requires_grad_(False).eval()
    clip.visual.requires_grad_(True).train()
    for module in clip.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return list(clip.visual.parameters())


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, without decay of biases, norms and other vectors."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


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
