"""A run's train states: what goes into one and comes out of one again."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from clip_models import CLIP, HFTokenizer, Preprocess, Tokenizer, load_model, save_model

from clip_train.config import TrainConfig
from clip_train.ema import Ema
from clip_train.guard import Guard
from clip_train.optimizers import load_whole_state, whole_state
from clip_train.sharding import gather_one
from clip_train.shards import Data
from clip_train.state import Position, read_tensors, save_state


class Saver:
    """Writes train states of a run's parts, whole ones even where the parts are in shards."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        initial_model: Any,
        model: CLIP,
        preprocess: Preprocess,
        tokenizer: Tokenizer | HFTokenizer,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        ema: Ema | None,
    ) -> None:
        """Args: initial_model: what the run started from, by content (`describe_initial`)."""
        self.config = config
        self.data = data
        self.initial_model = initial_model
        self.model = model
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.optimizer = optimizer
        self.guard = guard
        self.ema = ema

    def restore(self, path: Path) -> None:
        """Take up a train state, all but the model's weights: those go in before it is sharded."""
        tensors = read_tensors(path)
        load_whole_state(self.optimizer, tensors["optimizer"])
        self.guard.load_state_dict(tensors["guard"])
        if self.ema and (path / "model-ema").exists():  # there is none from before a --rebase
            self.ema.load_whole_state(load_model(path / "model-ema").model.state_dict())

    def save(self, position: Position, *, main: bool) -> None:
        """Write the train state, from the main process; every process must call it."""
        state = self.model.state_dict()
        weights = {"model": {name: gather_one(t, main) for name, t in state.items()}}
        if self.ema:
            weights["model-ema"] = self.ema.whole_state(main=main)
        optimizer = whole_state(self.optimizer, main=main)
        if not main:
            return
        provenance: dict[str, Any] = {
            "tool": f"clip-train {version('clip-train')}",
            "arguments": self.config.arguments,
            "initial_model": self.initial_model,
            **asdict(position),
            "samples_seen": position.samples,
            "data_hash": self.data.hash,
            "manifest_hash": self.data.manifest_hash,
        }

        def write_models(folder: Path) -> None:
            for name, state in weights.items():
                tools = (self.preprocess, provenance, self.tokenizer)
                save_model(folder / name, self.model, *tools, state)

        tensors = {"optimizer": optimizer, "guard": self.guard.state_dict()}
        save_state(self.config.output, position, tensors, write_models, self.config.keep_every)
