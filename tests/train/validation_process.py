"""One of several processes that validate a model, whole and sharded; each writes RANK.json."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from clip_models import CLIP, Preprocess, Tokenizer, architecture, without_shutdown
from clip_train import TrainConfig
from clip_train.sharding import is_sharded, shard
from clip_train.validate import Validator


def config(**changed: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": "XS",
        "train_data": "",
        "output": Path(),
        "samples_seen": 96,
        "batch_size": 16,
        "warmup": 0,
        "workers": 0,
    }
    return TrainConfig(**(values | {k: str(v) if "_data" in k else v for k, v in changed.items()}))


def validator(autocast: torch.dtype | None = None, **changed: Any) -> Validator:
    accelerator = Accelerator(mixed_precision="no")
    return Validator(config(**changed), Preprocess(64), Tokenizer(), accelerator, autocast=autocast)


def random_model(bias: float | None = None) -> CLIP:
    """Weights of four times the usual spread, so that embeddings differ."""
    torch.manual_seed(0)
    values = architecture("XS").to_dict() | {"init_logit_bias": bias}
    model = CLIP(type(architecture("XS")).from_dict(values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter *= 4
    return model.train()


if __name__ == "__main__":
    with without_shutdown():
        torch.set_num_threads(1)
        pairs, labelled = sys.argv[1:]
        subject = validator(val_data=pairs, zeroshot_data=labelled)
        whole, sharded = random_model(), random_model()
        shard(sharded, subject.accelerator.device)
        values = [subject.run(whole), subject.run(sharded), subject.run(sharded)]
        assert all(is_sharded(p) for p in sharded.parameters() if p.ndim)
        (Path(pairs) / f"{subject.accelerator.process_index}.json").write_text(json.dumps(values))
        subject.accelerator.wait_for_everyone()  # no process leaves while another still asks it
