"""What learns, as one module: a batch of one task goes in, its loss comes out."""

# B batch (of this process), S image side, E embedding, C classes, L tokens of a prompt

import math
from typing import cast

import torch
import torch.nn.functional as F
from clip_models import CLIP, ContrastiveLoss, Head, SigmoidLoss
from torch import Tensor, nn

from clip_finetune.config import TrainConfig

_MAX_LOGIT_SCALE = math.log(100)  # CLIP (2103.00020), section 2.5
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Learner(nn.Module):
    """The image tower with a head for each task, frozen or not; for FLYP both towers.

    Weights have the names that they have in `CLIP`; those of the heads begin with "head.".

    BatchNorm layers keep the base model's running statistics (their scale and shift do learn).
    Batches of alternating tasks would drag the statistics from one task to the next, and the tower
    that learns is then the tower that is evaluated and interpolated. The PAINT and WiSE-FT code
    lets them move; the paper's own towers have none.
    """

    def __init__(self, clip: CLIP, heads: list[Head], config: TrainConfig, world: int = 1) -> None:
        """Args: heads: of the tasks in order, on the model's device. world: processes."""
        super().__init__()
        self.bf16 = config.precision == "bf16"
        self.label_smoothing = config.label_smoothing
        self.flyp = config.method == "flyp"
        clip.requires_grad_(False).eval()
        self.visual: nn.Module = clip.visual
        self.visual.requires_grad_(True).train()
        if config.grad_checkpointing:
            clip.set_grad_checkpointing()
        if self.flyp:
            self.text: nn.Module = clip.text
            self.text.requires_grad_(True).train()
            self.logit_scale = clip.logit_scale.requires_grad_(True)
            self.logit_bias = clip.logit_bias
            form = "gather" if world > 1 else None
            kind = ContrastiveLoss if clip.logit_bias is None else SigmoidLoss
            self.pair_loss = kind(form)
            if self.logit_bias is not None:
                self.logit_bias.requires_grad_(True)
        for module in self.modules():
            if isinstance(module, _BATCH_NORMS):
                module.eval()
        learn_heads = config.method in ("end-to-end", "lp-ft")
        self.head = nn.ParameterDict()
        for number, head in enumerate(heads):
            self.head[f"weight_{number}"] = nn.Parameter(head.weight.clone(), learn_heads)
            self.head[f"bias_{number}"] = nn.Parameter(head.bias.clone(), learn_heads)

    def forward(
        self, images_B3SS: Tensor, labels_B: Tensor, task: int, prompts_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised pixels, labels and, for FLYP, the prompts' tokens -> (loss, hits).

        The loss is the mean over the batch, of all processes for FLYP. Hits are the images of which
        the task's head (for FLYP the head at the start) is right, a scalar.
        """
        texts_BE = None
        with torch.autocast(images_B3SS.device.type, torch.bfloat16, self.bf16):
            features_BE = cast(Tensor, self.visual(images_B3SS))
            if self.flyp:
                texts_BE = cast(Tensor, self.text(prompts_BL))
        features_BE = F.normalize(features_BE.float(), dim=-1)
        weight, bias = self.head[f"weight_{task}"], self.head[f"bias_{task}"]
        logits_BC = F.linear(features_BE, weight, bias)
        hits = (logits_BC.argmax(dim=1) == labels_B).float().sum()
        if texts_BE is None:
            loss = F.cross_entropy(logits_BC, labels_B, label_smoothing=self.label_smoothing)
            return loss, hits
        texts_BE = F.normalize(texts_BE.float(), dim=-1)
        scale = self.logit_scale.exp()
        loss = self.pair_loss(features_BE, texts_BE, scale, self.logit_bias)
        return cast(Tensor, loss), hits

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the logit scale within CLIP's bounds."""
        if self.flyp:
            self.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)


def tower_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a learner's state that has its place in `CLIP`."""
    return {name: weight for name, weight in state.items() if not name.startswith("head.")}
