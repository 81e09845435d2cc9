"""When a run had better stop: too many unreadable samples, too many skipped steps."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from clip_train import metrics
from clip_train.config import TrainConfig
from clip_train.errors import TrainError
from clip_train.state import Position
from clip_train.step import Update


def check_unreadable(position: Position, epoch: int, max_share: float) -> None:
    """Compare the samples replaced so far with those seen.

    Raises:
        TrainError: more than `max_share` of them.
    """
    # A few early failures say little: judge by at least an epoch or a thousand samples.
    judged = max(position.samples, min(epoch, 1000))
    if position.unreadable > max_share * judged:
        raise TrainError(
            f"{position.unreadable} unreadable samples after {position.samples:,} seen, more than "
            f"--max-error-share {max_share}; named above: repair the shards (clip-data verify) or "
            "raise the share"
        )


def count_skipped(
    position: Position, steps: Sequence[tuple[int, Update]]
) -> tuple[Position, list[metrics.Row]]:
    """Read what steps found: the position with their counts, and a row for each skipped one."""
    skipped: list[metrics.Row] = []
    if steps:
        found = torch.stack([torch.stack([u.skipped, u.grad_norm, u.loss]) for _, u in steps])
        for (step, _), (skip, norm, loss) in zip(steps, found.tolist(), strict=True):
            if skip:
                skipped.append({"step": step, "grad_norm": norm, "loss": loss})
            in_a_row = position.skipped_in_a_row + 1 if skip else 0
            position = replace(position, skipped_in_a_row=in_a_row)
    return replace(position, skipped=position.skipped + len(skipped)), skipped


def check_skipped(position: Position, config: TrainConfig) -> None:
    """Compare the skipped steps in a row with --max-skipped.

    Raises:
        TrainError: as many or more.
    """
    if position.skipped_in_a_row >= config.max_skipped:
        raise TrainError(
            f"the last {position.skipped_in_a_row} steps were skipped, up to step {position.step}: "
            "their gradients are not finite, or spikes; "
            f"{config.output / metrics.SKIPPED} names their samples; continue with a lower --lr, "
            "with --grad-clip or in bf16 (--rebase)"
        )
