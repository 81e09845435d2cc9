"""Frozen towers with their last groups left free: LiT (2111.07991)."""

from collections.abc import Sequence

from torch import nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def freeze_all_but(
    unlocked: int, tower: nn.Module, groups: Sequence[Sequence[nn.Module | nn.Parameter]]
) -> None:
    """Freeze a tower except its last `unlocked` groups, which run from input to output."""
    tower.requires_grad_(False)
    for group in groups[max(0, len(groups) - unlocked) :]:
        for part in group:
            part.requires_grad_(True)


def still_locked_norms(tower: nn.Module) -> None:
    """Put batch norms without a free parameter into eval mode: their statistics stay as well."""
    for module in tower.modules():
        if isinstance(module, _BATCH_NORMS) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()
