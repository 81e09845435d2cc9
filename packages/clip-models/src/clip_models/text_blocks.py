"""How the images of each rank meet the texts of all ranks, for the losses.

Image rows stay at home. Text rows visit: each rank works on its images against every rank's texts
once, reading what belongs to the texts and adding to a total that belongs to them as well (the
log-sum-exps of their columns, their gradient), which ends on the rank that owns them.
"""

# n texts of one rank, N of all ranks

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from clip_models.errors import ModelError

Form = Literal["gather", "ring"] | None
Work = Callable[[Sequence[Tensor], Tensor], None]


def meet_texts(
    form: Form,
    texts: Sequence[Tensor],
    total: Tensor,
    work: Work,
    to_owner: Callable[[Tensor], Tensor],
) -> Tensor:
    """Let this rank's images meet the texts of all ranks.

    Args:
        form: None: the texts of this process are all there are. "gather": all N are held at once;
            the fewest and largest transfers. "ring": a rank holds its own n and a neighbour's,
            while the next neighbour's arrive.
        texts: tensors of n rows that describe this rank's texts.
        total: n rows of "nothing yet" for the texts of one rank.
        work: called as work(texts, total), once with N rows or once for each rank's n; adds this
            rank's share to `total` in place. Every rank must call `meet_texts` in the same order.
        to_owner: sums the ranks' totals of N rows and returns the n rows of this rank (gather).

    Returns:
        The total of this rank's texts, with the shares of all ranks.
    """
    world = 1 if form is None else dist.get_world_size()
    if world == 1:
        work(texts, total)
        return total
    if form == "gather":
        total_N = torch.cat([total] * world)
        work([_all_gather(text) for text in texts], total_N)
        return to_owner(total_N)
    for step in range(world):
        last = step == world - 1
        # The next texts arrive during the work; the total can only leave after it, and its last
        # move takes it home. Gloo pairs messages by tag, NCCL by their order: both hold.
        arriving = None if last else _pass_on(texts, 1)
        work(texts, total)
        (total,) = _wait(*_pass_on([total], 0))
        texts = texts if arriving is None else _wait(*arriving)
    return total


def sum_to_owner(partial_N: Tensor) -> Tensor:
    """The sum over ranks of [N, ...], its n rows of this rank."""
    total_n = partial_N.new_empty(len(partial_N) // dist.get_world_size(), *partial_N.shape[1:])
    dist.reduce_scatter_tensor(total_n, partial_N)
    return total_n


def lse_to_owner(partial_N: Tensor) -> Tensor:
    """The log-sum-exp over ranks of [N], its n rows of this rank."""
    top_N = partial_N.clone()
    dist.all_reduce(top_N, dist.ReduceOp.MAX)
    total_n = sum_to_owner((partial_N - top_N).exp_())
    return total_n.log_() + top_N.chunk(dist.get_world_size())[dist.get_rank()]


def refuse_unequal_shapes(features_nE: Tensor) -> None:
    """Compare the shape of all ranks' features: an exchange of unequal ones may never return.

    Raises:
        ModelError: on every rank, if two differ.
    """
    shape = torch.tensor([features_nE.shape], device=features_nE.device)
    shapes = [(rows, width) for rows, width in _all_gather(shape).tolist()]
    if len(set(shapes)) > 1:
        raise ModelError(
            f"features of ranks 0 to {len(shapes) - 1} are {shapes}; expected the same rows and "
            "width on every rank: give each rank the same number of pairs (drop a short last batch)"
        )


def _all_gather(tensor: Tensor) -> Tensor:
    gathered = tensor.new_empty(len(tensor) * dist.get_world_size(), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


def _pass_on(tensors: Sequence[Tensor], tag: int) -> tuple[list[dist.Work], list[Tensor]]:
    """Start sending to the next rank and receiving from the one before; `_wait` for the result."""
    rank, world = dist.get_rank(), dist.get_world_size()
    arriving = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    moves: list[dist.P2POp] = []
    for i, (leaves, arrives) in enumerate(zip(tensors, arriving, strict=True), tag):
        moves.append(dist.P2POp(dist.isend, leaves.contiguous(), (rank + 1) % world, tag=i))
        moves.append(dist.P2POp(dist.irecv, arrives, (rank - 1) % world, tag=i))
    return dist.batch_isend_irecv(moves), arriving


def _wait(requests: Sequence[dist.Work], arriving: list[Tensor]) -> list[Tensor]:
    for request in requests:
        request.wait()
    return arriving
