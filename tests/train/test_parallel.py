"""One gradient, however it is shared out: processes, FSDP2's shards, micro-batches (float64)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import ROOT, environment, torchrun

# the whole gradient of one batch of eight, written by rank 0
PROGRAM = """
import sys, json
from pathlib import Path
import open_clip, torch
from accelerate import Accelerator
from clip_models import CLIP, ModelConfig, without_shutdown
from clip_train import TrainConfig
from clip_train.optimizers import make_optimizer
from clip_train.processes import distribute
from clip_train.sharding import whole
from clip_train.step import Stepper

cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
accelerator = Accelerator()
world, rank = accelerator.num_processes, accelerator.process_index

def run(case):
    dtype = getattr(torch, case["dtype"])
    torch.manual_seed(0)
    model = CLIP(ModelConfig.from_dict(case["model"])).to(dtype).train()
    model.set_grad_checkpointing(case["grad_checkpointing"])
    if case["lock_image"]:
        model.lock_image_tower(1)
    wrapped = distribute(model, accelerator)
    config = TrainConfig(
        model="", train_data="", output=Path(), samples_seen=8, batch_size=8, warmup=0, lr=1e-3,
        micro_batch_size=case["micro"], loss_exchange=case["exchange"], grad_clip=0.1,
    )
    stepper = Stepper(
        wrapped, model, make_optimizer(model, config), config,
        normalize=lambda x: x, autocast=None, world=world,
    )
    generator = torch.Generator().manual_seed(1)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    found = {}
    for step in range(3):
        images = torch.randn(8, 3, 64, 64, generator=generator).to(dtype)
        tokens = open_clip.tokenize([f"number {step} " + i * "dog " for i in range(8)])
        if step == 0:
            stepper.backward(images[mine], tokens[mine], seed=step)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found["gradient of " + name] = whole(p.grad).clone()
            stepper.optimizer.zero_grad()
        update = stepper.step(images[mine], tokens[mine], lr=1e-3, seed=step)
        found[f"loss {step}"] = accelerator.reduce(update.loss, "mean")
        found[f"norm {step}"] = update.grad_norm
    found |= {name: whole(p).detach() for name, p in model.named_parameters()}
    return found

with without_shutdown():
    for case in cases:
        found = run(case)
        if rank == 0:
            torch.save(found, folder / (case["name"] + ".pt"))
    accelerator.wait_for_everyone()
"""

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 16, "layers": 3},
    "text_cfg": {"width": 48, "heads": 3, "layers": 2, "context_length": 77},
}


PLAIN = {
    "model": MODEL,
    "dtype": "float64",
    "micro": 0,
    "exchange": "gather",
    "grad_checkpointing": False,
    "lock_image": False,
}
SIGLIP = {"model": MODEL | {"init_logit_bias": -10.0}}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FLOAT32 = {"dtype": "float32"}

MICRO = {"micro": 3, "grad_checkpointing": True}
REFERENCES: dict[str, dict[str, Any]] = {  # computed plainly, by one process
    "plain": {},
    "siglip": SIGLIP,
    "lit": {"lock_image": True},
}
WAYS: list[tuple[str, dict[str, Any]]] = [  # and otherwise
    ("plain", {}),
    ("plain", MICRO),
    ("plain", {"micro": 1, "exchange": "ring"}),
    ("siglip", MICRO),
    ("plain", FLOAT32),
    ("plain", FLOAT32 | MICRO),
    ("siglip", FLOAT32),
    ("lit", MICRO),
]


def run(folder: Path, cases: list[dict[str, Any]], processes: int, **changed: str) -> None:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launcher = torchrun(processes)[:-1] if processes > 1 else [sys.executable]
    result = subprocess.run(
        [*launcher, str(program), json.dumps(cases), str(folder)],
        cwd=ROOT,
        env=environment() | changed,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("references")
    run(folder, [PLAIN | changed | {"name": name} for name, changed in REFERENCES.items()], 1)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in REFERENCES}


@pytest.mark.parametrize(
    ("processes", "variables"),
    [
        (1, {}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, FSDP2, marks=pytest.mark.slow),
    ],
    ids=["one", "ddp", "fsdp2"],
)
def test_one_gradient(
    references: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
    processes: int,
    variables: dict[str, str],
) -> None:
    """Gradients within 1e-12 of one plain batch's, 2e-6 in float32, and so on for three steps."""
    cases = [
        PLAIN | REFERENCES[name] | way | {"name": f"case {number}"}
        for number, (name, way) in enumerate(WAYS)
    ]
    run(tmp_path, cases, processes, **variables)
    for number, (name, way) in enumerate(WAYS):
        expected = references[name]
        found = torch.load(tmp_path / f"case {number}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        if "dtype" in way:  # by whole towers: plain float32 is as far (9e-7) from float64 itself
            parts = ("gradient of visual", "gradient of text", "gradient of logit_", "loss 0")
            bound = 2e-6
        else:
            parts, bound = tuple(found), 1e-12
        for part in parts:
            names = [n for n in found if n.startswith(part)]
            ours, theirs = (torch.cat([d[n].flatten() for n in names]) for d in (found, expected))
            gap = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
            print(f"{name} {way} {part}: {gap:.1e}")
            assert gap < bound, (name, way, part)
